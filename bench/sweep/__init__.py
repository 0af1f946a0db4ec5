"""Every size: forward, and forward + backward with LoRA, over n, k and m; one file of results a machine, and pictures of it."""
