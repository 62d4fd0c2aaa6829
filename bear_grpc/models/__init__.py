"""The models a server knows: catalog, store, downloads, files and their states."""
