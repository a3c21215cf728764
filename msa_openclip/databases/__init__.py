"""Vectors in other people's databases: tables written from indexes and partitions, their candidates scored exactly."""
