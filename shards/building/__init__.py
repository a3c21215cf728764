"""From records to shards on disk: plan, write, resume."""
