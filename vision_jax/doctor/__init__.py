"""The doctor: what is wrong with a data set before any training, where, and what to do."""
