"""Who runs it where: the command line, Ray, the gang of ranks and the run folder's readers."""
