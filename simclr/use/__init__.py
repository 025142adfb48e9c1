"""What one does with an encoder: embed images, search among them, find those that are alike, name what they show."""
