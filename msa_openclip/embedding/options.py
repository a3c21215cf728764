"""What can be asked of a job that embeds an archive; imports nothing heavy, for the command line."""

PARTITION_IMAGES = 4096
"""Images in a partition, the unit in which an interrupted job goes on."""
ENGINES = ("here", "ray")
"""Who does the work: this process (or the ranks of torchrun), or workers of a Ray cluster."""
