"""What a program compiled for an H100 would launch, move and compute, read off without a GPU."""
