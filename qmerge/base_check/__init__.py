"""Is this the base that the adapter was trained on? By names and revisions, and by the numbers of its deltas."""
