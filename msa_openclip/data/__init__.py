"""Where images and captions come from: shards, caption files, folders; streams and pixels."""
