"""MatryoshkaKV: keys and values in fewer dimensions, through nested orthogonal bases for each layer and KV head (arXiv 2410.14731).

bases        what is stored: matrices and ranks
cayley       orthogonal matrices from free numbers, for training
statistics   second moments of keys, values and queries, from text
init         bases from the moments, or from no data at all
student      the model with its attention in the reduced space
train        the bases learn to imitate the full model
ranks        which head gets how many dimensions
checkpoint   the file that holds them
"""
