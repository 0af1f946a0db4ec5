"""peftk as a backend of other packages. Each is imported where it is used."""
