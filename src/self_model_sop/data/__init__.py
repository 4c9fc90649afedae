"""Raw data to training data: fetch, process, inspect."""
