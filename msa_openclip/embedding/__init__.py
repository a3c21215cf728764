"""Archives into vectors: any batch of images, and lists of them partition by partition, under any engine."""
