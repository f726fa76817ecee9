# SPDX-License-Identifier: Apache-2.0
"""One adapter per system: how to run a case of it on pyvseg.

An adapter is a function

    run(manifest, weights, inputs) -> iterator of (name, result) or (name, result, Rule)

that gets the case's manifest, the published state dict by published names, and the "in/..." tensors. It yields every
"out/..." and "tap/..." tensor, whole (thinning is done by the comparison). A Rule stands in for the manifest's tolerance
where the case's notes state another one; `NotCovered(reason)` in place of a result admits that a tensor is left out.
A new system adds one file here and one row below.
"""

from pyvseg.verify.adapters import (
    ctvis,
    kmax,
    mask2former,
    metrics_dvps,
    metrics_vis_vss,
    metrics_vos,
    metrics_vps,
    minvis,
    ops_kernel_update,
    ops_kmeans_cross_attention,
    ops_memory_read,
    ops_ms_deform_attn,
    ops_track_quasi_dense,
    pcvos,
    polyphonicformer,
    stcn,
    tube_link,
    transvod,
    video_kmax,
    video_knet,
    vita,
)
from pyvseg.verify.adapters.not_covered import NotCovered

ADAPTERS = {
    "ctvis": ctvis.run,
    "genvis": vita.run_genvis,
    "kmax": kmax.run,
    "mask2former": mask2former.run,
    "mask2former-video": minvis.run_joint,
    "metrics-dvps": metrics_dvps.run,
    "metrics-vos": metrics_vos.run,
    "metrics-vps": metrics_vps.run,
    "metrics_vis_vss_vod": metrics_vis_vss.run,  # so say the cases metrics-ytvis and metrics-vspw
    "minvis": minvis.run,
    "ops-kernel_update": ops_kernel_update.run,
    "ops-kmeans_cross_attention": ops_kmeans_cross_attention.run,
    "ops-memory_read": ops_memory_read.run,
    "ops": ops_ms_deform_attn.run,  # so says the case ops-ms_deform_attn
    "ops-track_quasi_dense": ops_track_quasi_dense.run,
    "pcvos": pcvos.run,
    "polyphonic": polyphonicformer.run,
    "stcn": stcn.run,
    "tube_link": tube_link.run,
    "transvod": transvod.run,
    "transvodlite": transvod.run_lite,
    "transvodpp": transvod.run_plus_plus,
    "video_kmax": video_kmax.run,
    "video_knet": video_knet.run,
    "video_knet_vis": video_knet.run_instances,
    "vita": vita.run_vita,
}

__all__ = ["ADAPTERS", "NotCovered"]
