"""What the user wrote: CVXPY's problem read, checked, put into normal form and canonicalised."""
