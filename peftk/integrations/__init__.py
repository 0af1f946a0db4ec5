"""Other frameworks on peftk's layers and kernels. Each module imports its framework; nothing in peftk imports these modules."""
