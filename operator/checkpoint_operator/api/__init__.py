"""The vocabulary that every room shares: models, names, URIs, the mover protocol, error codes. No I/O, no clocks."""
