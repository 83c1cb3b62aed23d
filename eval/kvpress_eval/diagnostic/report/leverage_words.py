"""What the counts of a leverage comparison are called, the same on the terminal and on the page."""

#: field of LeverageSplit -> words
LEVERAGE = {
    "agreement": "signs agree",
    "opposite": "signs opposite",
    "residual_match": "residual matches MII",
    "rescues": "rescues",
    "breaks": "breaks",
    "taxes": "taxes",
    "support_failures": "neither helps",
}
