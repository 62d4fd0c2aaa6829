"""Model files from a hub: names, identity, verified downloads, and where the bytes lie."""
