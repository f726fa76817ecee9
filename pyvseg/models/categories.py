# SPDX-License-Identifier: Apache-2.0
"""Class names of the data sets; of those for video instances and ImageNet VID, class i of a model is category i + 1 of the data set."""

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
VIPSEG = tuple(  # class i is category i
    "wall ceiling door stair ladder escalator Playground_slide handrail_or_fence window rail goal pillar pole floor ground grass sand "
    "athletic_field road path crosswalk building house bridge tower windmill well_or_well_lid other_construction sky mountain stone wood "
    "ice snowfield grandstand sea river lake waterfall water billboard_or_Bulletin_Board sculpture pipeline flag parasol_or_umbrella "
    "cushion_or_carpet tent roadblock car bus truck bicycle motorcycle wheeled_machine ship_or_boat raft airplane tyre traffic_light "
    "lamp person cat dog horse cattle other_animal tree flower other_plant toy ball_net backboard skateboard bat ball "
    "cupboard_or_showcase_or_storage_rack box traveling_case_or_trolley_case basket bag_or_package trash_can cage plate "
    "tub_or_bowl_or_pot bottle_or_cup barrel fishbowl bed pillow table_or_desk chair_or_seat bench sofa shelf bathtub gun commode roaster "
    "other_machine refrigerator washing_machine Microwave_oven fan curtain textiles clothes painting_or_poster mirror "
    "flower_pot_or_vase clock book tool blackboard tissue screen_or_television computer printer Mobile_phone keyboard "
    "other_electronic_product fruit food instrument train".split()
)
VIPSEG_THINGS = (
    2, 4, 8, 10, 41, 43, 44, *range(46, 53), 54, 55, 56, *range(60, 66), 72, 74, *range(76, 80), *range(82, 93), *range(95, 98), *range(99, 103),
    *range(106, 110), *range(114, 119), 122, 123,
)  # fmt: skip
CITYSCAPES = tuple(  # train ids; also KITTI-STEP
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck bus train motorcycle bicycle".split()
)
CITYSCAPES_THINGS = tuple(range(CITYSCAPES.index("person"), len(CITYSCAPES)))
KITTI_STEP_THINGS = (CITYSCAPES.index("person"), CITYSCAPES.index("car"))
IMAGENET_VID = tuple(
    "airplane antelope bear bicycle bird bus car cattle dog domestic_cat elephant fox giant_panda hamster horse lion lizard monkey motorcycle "
    "rabbit red_panda sheep snake squirrel tiger train turtle watercraft whale zebra".split()
)
COCO_THINGS = (  # class i is the i-th of the 80, whose numbers in COCO's files have gaps
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant", "stop sign", "parking meter",
    "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase",
    "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COCO_PANOPTIC = COCO_THINGS + tuple(  # then the stuff
    "banner blanket bridge cardboard counter curtain door-stuff floor-wood flower fruit gravel house light mirror-stuff net pillow platform "
    "playingfield railroad river road roof sand sea shelf snow stairs tent towel wall-brick wall-stone wall-tile wall-wood water-other "
    "window-blind window-other tree-merged fence-merged ceiling-merged sky-other-merged cabinet-merged table-merged floor-other-merged "
    "pavement-merged mountain-merged grass-merged dirt-merged paper-merged food-other-merged building-other-merged rock-merged "
    "wall-other-merged rug-merged".split()
)
ADE20K_THINGS = (  # of the 150 classes
    7, 8, 10, 12, 14, 15, *range(18, 21), *range(22, 25), 27, *range(30, 34), *range(35, 40), *range(41, 46), 47, 49, 50, 53, *range(55, 59), 62,
    *range(64, 68), *range(69, 77), 78, *range(80, 84), *range(85, 91), 92, 93, 95, 97, 98, *range(102, 105), 107, 108, *range(110, 113), 115, 116,
    *range(118, 122), *range(123, 128), 129, 130, *range(132, 140), 142, 143, 144, *range(146, 150),
)  # fmt: skip
