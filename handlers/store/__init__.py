"""Every MongoDB call, one file a collection. The only package that imports pymongo."""
