"""Images in: what a user names as a source, how it is cropped and scaled, and the packed dataset that training reads."""
