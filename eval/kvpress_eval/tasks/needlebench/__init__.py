"""NeedleBench v2 (arXiv 2407.11963; open-compass/opencompass): facts hidden at known depths of long documents.

s_rt: one fact, one question. m_rt: eleven facts at eleven depths, one combined question. m_rs: two to five linked facts,
one question that needs all of them. atc: a chain of kinship without a document around it.

Families: `needlebench-v2` is the original protocol with the original files, its flaws included; `needlebench-v2-fixed`
mends them; `needlebench-recipe` has needles of our own in the published grammar and counts in the model's own tokenizer.
"""
