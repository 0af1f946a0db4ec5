"""peftk underneath other frameworks; each module imports its package where it is used."""
