"""Published weights of whole segmentation, detection and pose models, by the name of the config they are for."""

_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download/%23"
_VMAMBA_ADE20K = _VMAMBA + "v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_"
_VSSD = "https://huggingface.co/YuhengSSS/VSSD/resolve/main/"
_PLAINMAMBA = "https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/segmentation/"
_DRIVE = "https://drive.google.com/"

_LINKS = {
    "mask_rcnn_msvmamba_micro_d64_fpn_8xb2_1x_coco": _DRIVE + "drive/folders/12CrNAGBalU0yoQcQgPTGO5lM397Jc4La",
    "mask_rcnn_msvmamba_micro_d64_fpn_8xb2_3x_coco": _DRIVE + "drive/folders/10-8cDnRfnk_j4QxMHkhUyecucnM_82pt",
    "mask_rcnn_msvmamba_tiny_fpn_8xb2_1x_coco": _DRIVE + "drive/folders/1MogQ6PGdrgsyJckJTL9BJzlMCodJ3epu",
    "mask_rcnn_msvmamba_tiny_fpn_8xb2_3x_coco": _DRIVE + "drive/folders/1dK1qFjaU8GmqvsmMr1mgppNJlNacHPtG",
    "mask_rcnn_spatialmamba_base_fpn_8xb2_1x_coco": _DRIVE + "file/d/1oTyT0q88ernqc1_IyqBWHrVJJPGNRN8r/view",
    "mask_rcnn_spatialmamba_small_fpn_8xb2_1x_coco": _DRIVE + "file/d/1pzjz1A6nWA9W2FW2Ymg5JSAMbvxmc2hP/view",
    "mask_rcnn_spatialmamba_small_fpn_8xb2_3x_coco": _DRIVE + "file/d/19fDAk8cyMplgVRKqU0BC_3l1NxXzHYl_/view",
    "mask_rcnn_spatialmamba_tiny_fpn_8xb2_1x_coco": _DRIVE + "file/d/1lmA0_pBQbvuMkJD1R5m3oS_2jXaSy3N3/view",
    "mask_rcnn_spatialmamba_tiny_fpn_8xb2_3x_coco": _DRIVE + "file/d/1PY0_8ZCwogssmaULdc6MzVbCTGm_83Ew/view",
    "mask_rcnn_vmamba_base_s2l15_fpn_8xb2_1x_coco": _VMAMBA + "v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth",
    "mask_rcnn_vmamba_small_s2l15_fpn_8xb2_1x_coco": _VMAMBA + "v2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth",
    "mask_rcnn_vmamba_small_s2l15_fpn_8xb2_3x_coco": _VMAMBA + "v2det/mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth",
    "mask_rcnn_vmamba_tiny_s1l8_fpn_8xb2_1x_coco": _VMAMBA + "v2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth",
    "mask_rcnn_vmamba_tiny_s1l8_fpn_8xb2_3x_coco": _VMAMBA + "v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth",
    "mask_rcnn_vmamba_tiny_s2l5_fpn_8xb2_1x_coco": _VMAMBA + "v2det/mask_rcnn_vssm_fpn_coco_tiny_epoch_12.pth",
    "mask_rcnn_vssd_micro_d48_fpn_8xb2_1x_coco": _VSSD + "mask_rcnn_vssd_fpn_coco_micro.pth",
    "mask_rcnn_vssd_micro_d48_fpn_8xb2_3x_coco": _VSSD + "mask_rcnn_vssd_fpn_coco_micro_3x.pth",
    "mask_rcnn_vssd_small_fpn_8xb2_1x_coco": _VSSD + "mask_rcnn_vssd_fpn_coco_small.pth",
    "mask_rcnn_vssd_tiny_fpn_8xb2_1x_coco": _VSSD + "mask_rcnn_vssd_fpn_coco_tiny.pth",
    "mask_rcnn_vssd_tiny_fpn_8xb2_3x_coco": _VSSD + "mask_rcnn_vssd_fpn_coco_tiny_3x.pth",
    "heatmap_hrvmamba_base_pose_8xb32_210e_coco_256x192": _DRIVE + "file/d/14JE7v6jdxtJaEMJCatqbmuhLkfBYVBOX/view",
    "heatmap_hrvmamba_base_pose_8xb32_210e_coco_384x288": _DRIVE + "file/d/161d_LhWBBvBOSXxPBGRBNCjYr8PP0w9c/view",
    "heatmap_hrvmamba_small_pose_8xb32_210e_coco_256x192": _DRIVE + "file/d/1L3CO3D4L1Q1galRaSC82taDDqFqmukKt/view",
    "heatmap_hrvmamba_small_pose_8xb32_210e_coco_384x288": _DRIVE + "file/d/1aqkUoQog4hl1dSbkUkwQvlwgistpxtzQ/view",
    "heatmap_hrvmamba_tiny_pose_8xb32_210e_coco_256x192": _DRIVE + "file/d/1cj6VPnSiyCDQHuDEZIIytyEQO-Xr-pPO/view",
    "upernet_hrvmamba_base_seg_8xb2_160k_ade20k_512": _DRIVE + "file/d/1O288Y_VhuWRtTXO2WpTbGkEwEn2raik-/view",
    "upernet_msvmamba_micro_d64_4xb4_160k_ade20k_512": _DRIVE + "drive/folders/1naZHL4mwTchllAE001SsyZ_z4y_JRF0s",
    "upernet_msvmamba_tiny_4xb4_160k_ade20k_512": _DRIVE + "drive/folders/1FaFPFExDd_4goIlLjTR7fXsuMRr-vYoY",
    "upernet_plainmamba_l1_8xb2_160k_ade20k_512": _PLAINMAMBA + "l1_upernet.pth",
    "upernet_plainmamba_l2_8xb2_160k_ade20k_512": _PLAINMAMBA + "l2_upernet.pth",
    "upernet_plainmamba_l3_8xb2_160k_ade20k_512": _PLAINMAMBA + "l3_upernet.pth",
    "upernet_spatialmamba_base_4xb4_160k_ade20k_512": _DRIVE + "file/d/1DLSC20TiSfzWrdgLRSdgrhnDn79nruB6/view",
    "upernet_spatialmamba_small_4xb4_160k_ade20k_512": _DRIVE + "file/d/1Ve07Um4dIPCcdg0mdNLjGxJtxKNWB_Sy/view",
    "upernet_spatialmamba_tiny_4xb4_160k_ade20k_512": _DRIVE + "file/d/1ngRweMh6vLjfZ43fb_o_ZyHs6psxb6Ix/view",
    "upernet_vmamba_base_s2l15_4xb4_160k_ade20k_512": _VMAMBA_ADE20K + "base_iter_160000.pth",
    "upernet_vmamba_small_s2l15_4xb4_160k_ade20k_512": _VMAMBA_ADE20K + "small_iter_144000.pth",
    "upernet_vmamba_tiny_s1l8_4xb4_160k_ade20k_512": _VMAMBA_ADE20K + "tiny_s_iter_160000.pth",
    "upernet_vssd_micro_d48_4xb4_160k_ade20k_512": _VSSD + "upernet_vssd_final_4xb4-160k_ade20k-512x512_micro.pth",
    "upernet_vssd_tiny_4xb4_160k_ade20k_512": _VSSD + "upernet_vssd_4xb4-160k_ade20k-512x512_tiny.pth",
}


def _file_of(config: str, url: str) -> str:
    """Name in the cache: the published one, or where a link does not tell it (Google Drive), the config's."""
    file = url.rsplit("/", 1)[1]
    return file if file.endswith(".pth") else f"{config}.pth"


OFFICIAL_MODELS = {name: (url, _file_of(name, url)) for name, url in _LINKS.items()}
"""Link and name of the file, by config. Links to Google Drive are pages, where a person downloads."""
