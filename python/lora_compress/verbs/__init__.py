"""The verbs: what the library and the command line do, one file each."""
