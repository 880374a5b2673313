"""Files from strangers, surface by surface: none runs code, destroys, leaks, hangs or ends in a traceback."""
