"""Which transformation leads from one image to another? The world model is used to search for it."""
