"""`python -m kvk demo`: a real model and a real text through the paged cache, beside plain torch attention."""
