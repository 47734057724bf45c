"""The commands, one file per family; each imports what it needs when it is called."""
