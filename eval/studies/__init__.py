"""Studies of guides on the testbed, one a file; :mod:`eval.guides` runs them by name."""
