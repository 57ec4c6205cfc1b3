"""A pretrained transformer's attention taken over by a window and a memory."""
