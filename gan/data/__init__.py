"""Images in: opening what a user names, cropping and scaling it, packing it into the dataset that training reads."""
