"""Many images, and many products, over Ray: on this machine or on a cluster, by the same commands."""
