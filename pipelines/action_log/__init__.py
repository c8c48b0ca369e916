"""What was drawn for each sample? Written as Parquet, read and rendered again."""
