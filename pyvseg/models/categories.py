# SPDX-License-Identifier: Apache-2.0
"""Class names of the video instance segmentation data sets; class i of a model is category i + 1 of the data set."""

YOUTUBE_VIS_2019 = tuple(
    "person giant_panda lizard parrot skateboard sedan ape dog snake monkey hand rabbit duck cat cow fish train horse turtle bear "
    "motorbike giraffe leopard fox deer owl surfboard airplane truck zebra tiger elephant snowboard boat shark mouse frog eagle "
    "earless_seal tennis_racket".split()
)
YOUTUBE_VIS_2021 = tuple(
    "airplane bear bird boat car cat cow deer dog duck earless_seal elephant fish flying_disc fox frog giant_panda giraffe horse "
    "leopard lizard monkey motorbike mouse parrot person rabbit shark skateboard snake snowboard squirrel surfboard tennis_racket "
    "tiger train truck turtle whale zebra".split()
)
OVIS = tuple(
    "person bird cat dog horse sheep cow elephant bear zebra giraffe poultry giant_panda lizard parrot monkey rabbit tiger fish turtle "
    "bicycle motorcycle airplane boat vehicle".split()
)
