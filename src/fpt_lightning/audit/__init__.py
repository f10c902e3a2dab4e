"""What the stored features say of a data set: duplicates, doubtful labels, outliers, shortcuts and a map.

Thin: it reads pooled features and low-resolution copies of a finished store, and trains nothing but linear probes.
"""
