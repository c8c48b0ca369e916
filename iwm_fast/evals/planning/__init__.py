"""Which transformation leads from one image to another? The world model is searched for it."""
