"""What goes out of a run or a conversion: its model card, where it comes from, and uploads to a hub."""
