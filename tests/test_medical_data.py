"""Medical volumes: NIfTI, DICOM and array files, orientation and spacing, and what is refused."""

import gzip
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")
nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

from vision_ssm.data import (  # noqa: E402
    MedicalDataError,
    NiftiSlices,
    NiftiVolumes,
    Volume,
    read_nifti,
    read_volume,
    scale_intensities,
    write_nifti,
)
from vision_ssm.data.medical_cases import Reading, find_cases  # noqa: E402
from vision_ssm.data.medical_dicom import read_dicom  # noqa: E402
from vision_ssm.data.medical_files import read_arrays, stem_of  # noqa: E402
from vision_ssm.data.medical_intensity import check_hounsfield, check_range  # noqa: E402
from vision_ssm.data.medical_transforms import zoom_pair  # noqa: E402
from vision_ssm.data.medical_volume import check_orientation, labels_of, optional  # noqa: E402

SHAPE, SPACING = (7, 9, 5), (0.8, 1.5, 4.0)  # voxels and mm along x, y, z


def rotation(*degrees: float) -> np.ndarray:
    turn = np.eye(3)
    for (first, second), angle in zip(((0, 1), (1, 2), (0, 2)), degrees):
        step = np.eye(3)
        step[first, first] = step[second, second] = math.cos(math.radians(angle))
        step[second, first] = math.sin(math.radians(angle))
        step[first, second] = -step[second, first]
        turn = turn @ step
    return turn


def affine_of(codes: str, degrees: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    """Affine of a file whose axes x, y, z run towards `codes`, turned by `degrees`."""
    columns = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = rotation(*degrees) @ np.array([columns[code] for code in codes], dtype=float).T * SPACING
    affine[:3, 3] = 11, -7, 30
    return affine


def voxels(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.RandomState(seed).randint(-900, 900, shape).astype(np.int16)


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine_of("LPS") if affine is None else affine), path)
    return path


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LIA", "PIL", None])
@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "PSR", "ILA"])
def test_every_voxel_keeps_its_place_in_the_patient(tmp_path, codes, orientation):
    values, affine = voxels(), affine_of(codes, (14, -9, 6))
    labels = (np.arange(values.size) % 4).astype(np.uint8).reshape(SHAPE)
    volume = read_volume(
        save(tmp_path / "case.nii.gz", values, affine), save(tmp_path / "mask.nii.gz", labels, affine),
        orientation=orientation,
    )
    assert "".join(nibabel.aff2axcodes(volume.affine)) == (orientation or codes)
    assert volume.image.dtype == np.float32 and volume.mask.dtype == np.int64 and volume.case == "case"
    assert np.allclose(volume.spacing, np.linalg.norm(volume.affine[:3, :3], axis=0)[::-1])
    places = {}
    for index in np.ndindex(*values.shape):
        places[tuple(np.round(affine @ [*index, 1], 2)[:3])] = values[index], labels[index]
    for d, h, w in np.ndindex(*volume.mask.shape):
        place = tuple(np.round(volume.affine @ [w, h, d, 1], 2)[:3])
        assert places.pop(place) == (volume.image[d, 0, h, w], volume.mask[d, h, w])
    assert not places


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR"])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (14, -9, 6)])
def test_a_mask_goes_back_onto_the_files_own_voxels(tmp_path, codes, degrees):
    affine = affine_of(codes, degrees)
    labels = np.random.RandomState(1).randint(0, 5, SHAPE).astype(np.uint8)
    volume = read_volume(save(tmp_path / "a.nii", voxels(), affine), save(tmp_path / "b.nii.gz", labels, affine))
    write_nifti(tmp_path / "new" / "out.nii.gz", volume.mask, volume)
    back = nibabel.load(tmp_path / "new" / "out.nii.gz")
    assert np.array_equal(np.asarray(back.dataobj), labels) and back.get_data_dtype() == np.uint8
    assert np.allclose(back.affine, affine, atol=1e-4) and np.allclose(back.get_qform(), affine, atol=1e-3)
    assert back.header.get_xyzt_units()[0] == "mm"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.nii.gz"]
    with pytest.raises(ValueError, match=r"are \(1, 2, 3\), the volume is"):
        write_nifti(tmp_path / "out.nii.gz", np.zeros((1, 2, 3), dtype=np.uint8), volume)
    with pytest.raises(ValueError, match="ends in .nii.gz or .nii"):
        write_nifti(tmp_path / "out.png", volume.mask, volume)
    (tmp_path / "file").write_text("")
    with pytest.raises(MedicalDataError, match="cannot write"):
        write_nifti(tmp_path / "file" / "out.nii", volume.mask, volume)


def test_writing_without_a_file_behind_it(tmp_path):
    volume = Volume(np.zeros((3, 1, 4, 5), dtype=np.float32), None, (2.0, 1.5, 1.0), None, "x")
    for values, kind in ((np.full((3, 4, 5), 300), np.int16), (np.full((3, 4, 5), 0.25), np.float32)):
        values[0, 0, 1] = 1
        write_nifti(tmp_path / "x.nii", values, volume)
        back = nibabel.load(tmp_path / "x.nii")
        assert back.shape == (5, 4, 3) and back.header.get_zooms() == (1.0, 1.5, 2.0) and back.get_data_dtype() == kind
        assert back.dataobj[1, 0, 0] == 1


def test_channels_single_slices_and_flat_files(tmp_path):
    first = save(tmp_path / "case_0000.nii.gz", voxels(0))
    second = save(tmp_path / "case_0001.nii.gz", voxels(1)[::-1], affine_of("RPS") @ _shift(6))
    with pytest.raises(MedicalDataError, match="affines place voxels"):
        read_volume([first, second])
    aligned = affine_of("LPS") @ np.diag([-1, 1, 1, 1.0])
    aligned[:3, 3] = (affine_of("LPS") @ [6, 0, 0, 1])[:3]
    save(second, voxels(1)[::-1], aligned)
    volume = read_volume([first, second])
    assert volume.case == "case" and volume.image.shape == (5, 2, 9, 7)
    assert np.array_equal(volume.image[:, 1], voxels(1).transpose(2, 1, 0))
    for values in (voxels(shape=(7, 9)), voxels(shape=(7, 9, 1)), voxels(shape=(7, 9, 1, 1))):
        flat = read_volume(save(tmp_path / "flat.nii", values))
        assert flat.image.shape == (1, 1, 9, 7) and np.array_equal(flat.image[0, 0], values.reshape(7, 9).T)
    one = save(tmp_path / "scaled.nii", voxels())
    assert np.array_equal(read_volume(one, rescale=(2, -24)).image[:, 0], 2.0 * voxels().transpose(2, 1, 0) - 24)
    with pytest.raises(ValueError, match="no image"):
        read_volume([])


def _shift(voxels_along_x: int) -> np.ndarray:
    shift = np.eye(4)
    shift[0, 3] = voxels_along_x
    return shift


def header(path: Path, **fields) -> Path:
    """A NIfTI file with fields of its header set as no library would."""
    image = nibabel.Nifti1Image(voxels(), affine_of("LPS"))
    image.header.set_qform(affine_of("LPS"), 1)
    for name, value in fields.items():
        image.header[name] = value
    with open(path, "wb") as file:
        file.write(image.header.binaryblock + b"\0" * 4 + voxels().tobytes(order="F"))
    return path


BAD_NIFTI = [
    (dict(pixdim=[1, 0, 1.5, 4, 1, 1, 1, 1], sform_code=0), "spacing of 0 x 1.5 x 4 mm"),
    (dict(pixdim=[1, 0.8, 1.5, 0, 1, 1, 1, 1]), "spacing of 0.8 x 1.5 x 0 mm"),
    (dict(srow_x=[0, 0, 0, 0], srow_y=[0, 1, 0, 0], srow_z=[0, 0, 1, 0]), "spacing of 0 x 1 x 1 mm"),
    (dict(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0], srow_z=[0, 0, 1, 0]), "axes lie in one plane"),
    (dict(srow_x=[np.nan, 0, 0, 0]), "not a finite 4 x 4"),
]


@pytest.mark.filterwarnings("ignore:sform and qform")
@pytest.mark.parametrize("fields, message", BAD_NIFTI)
def test_headers_that_place_nothing(tmp_path, fields, message):
    with pytest.raises(MedicalDataError, match=message) as caught:
        read_volume(header(tmp_path / "bad.nii", **fields))
    assert "bad.nii" in str(caught.value)


def test_headers_that_are_used_with_a_warning(tmp_path, recwarn):
    assert read_volume(header(tmp_path / "good.nii")).spacing == pytest.approx((4, 1.5, 0.8), rel=1e-5)
    assert not list(recwarn)
    with pytest.warns(UserWarning, match="does not say its orientation"):
        read_volume(header(tmp_path / "nowhere.nii", sform_code=0, qform_code=0))
    sheared = affine_of("LPS")
    sheared[:3, 2] += sheared[:3, 1]
    with pytest.warns(UserWarning, match=r"20\.6 degrees off a right angle"):  # atan(1.5 / 4)
        volume = read_volume(save(tmp_path / "tilted.nii", voxels(), sheared))
    write_nifti(tmp_path / "back.nii", volume.image[:, 0], volume)
    back = nibabel.load(tmp_path / "back.nii")
    assert np.allclose(back.affine, sheared, atol=1e-4) and int(back.header["qform_code"]) == 0
    with pytest.warns(UserWarning, match="sform and qform of .* differ"):
        read_volume(header(tmp_path / "two.nii", srow_x=[-0.8, 0, 0, 50]))


def test_spacing_in_other_units(tmp_path):
    image = nibabel.Nifti1Image(voxels(), np.diag([0.0008, 0.0015, 0.004, 1]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "metres.nii")
    assert read_volume(tmp_path / "metres.nii").spacing == pytest.approx((4, 1.5, 0.8))


def truncated(path: Path) -> Path:
    save(path, voxels())
    path.write_bytes(path.read_bytes()[:300])
    return path


def coloured(path: Path) -> Path:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return save(path, np.zeros(SHAPE, dtype=kind))


UNUSABLE = [
    (lambda folder: save(folder / "a.nii", voxels(shape=(7, 9, 5, 3))), "4 dimensions, 7 x 9 x 5 x 3"),
    (lambda folder: truncated(folder / "a.nii.gz"), "cannot read NIfTI file"),
    (lambda folder: truncated(folder / "a.nii"), "cannot read NIfTI file"),
    (lambda folder: coloured(folder / "a.nii"), "not plain numbers"),
    (lambda folder: save(folder / "a.nii", np.where(voxels() > 800, np.nan, 0).astype(np.float32)), "not finite"),
    (lambda folder: folder / "a.nii", "no image"),
    (lambda folder: Path(__file__), "neither a NIfTI file"),
    (lambda folder: folder, "holds no DICOM slice"),
]


@pytest.mark.parametrize("make, message", UNUSABLE)
def test_files_that_cannot_be_used(tmp_path, make, message):
    with pytest.raises(MedicalDataError, match=message):
        read_volume(make(tmp_path))
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"no image at all" * 100))
    with pytest.raises(MedicalDataError, match="text.nii.gz"):
        read_nifti(tmp_path / "text.nii.gz")


def shifted_affine() -> np.ndarray:
    affine = affine_of("LPS")
    affine[0, 3] += 2.5
    return affine


LABELS = [
    (np.zeros((7, 9, 6), np.uint8), None, r"is 7 x 9 x 5 voxels, its label map '.*' 7 x 9 x 6"),
    (np.zeros(SHAPE, np.uint8), shifted_affine(), r"voxels up to 2\.5 mm apart"),
    (np.full(SHAPE, 3, np.uint8), None, r"holds the labels 3, but 3 classes .* 0 to 2"),
    (np.full(SHAPE, -1, np.int16), None, "negative labels, down to -1"),
    (np.full(SHAPE, 0.5, np.float32), None, "fractions from 0.5 to 0.5"),
    (np.zeros((*SHAPE, 2), np.uint8), None, "4 dimensions"),
]


@pytest.mark.parametrize("values, affine, message", LABELS)
def test_label_maps_that_do_not_belong_to_the_image(tmp_path, values, affine, message):
    image, mask = save(tmp_path / "image.nii.gz", voxels()), save(tmp_path / "mask.nii.gz", values, affine)
    with pytest.raises(MedicalDataError, match=message) as caught:
        read_volume(image, mask, num_classes=3)
    assert "mask.nii.gz" in str(caught.value)


def test_label_maps_in_another_order_of_voxels(tmp_path):
    labels = np.random.RandomState(1).randint(0, 3, SHAPE).astype(np.float32)  # whole numbers in floats are fine
    image = save(tmp_path / "image.nii.gz", voxels())
    affine = affine_of("LPS") @ np.diag([-1, 1, 1, 1.0])
    affine[:3, 3] = (affine_of("LPS") @ [6, 0, 0, 1])[:3]
    volume = read_volume(image, save(tmp_path / "mask.nii.gz", labels[::-1], affine), num_classes=3)
    assert np.array_equal(volume.mask, labels.transpose(2, 1, 0))
    assert labels_of(np.array([True, False]), "x").tolist() == [1, 0]
    with pytest.raises(MedicalDataError, match="not whole numbers"):
        labels_of(np.array(["a"]), "x")


@pytest.mark.parametrize("orientation", ["LP", "LLS", "LRS", "XPS", 3])
def test_orientations_that_are_none(orientation):
    with pytest.raises(ValueError, match="one side for each of the axes"):
        check_orientation(orientation)


def test_volumes_check_themselves():
    image = np.zeros((2, 1, 3, 4), dtype=np.float32)
    with pytest.raises(ValueError, match=r"\(D, C, H, W\)"):
        Volume(image[0], None, (1, 1, 1), None, "x")
    with pytest.raises(MedicalDataError, match="differ in shape"):
        Volume(image, np.zeros((2, 4, 3), dtype=np.int64), (1, 1, 1), None, "x")
    for spacing in ((1, 0, 1), (1, 1), (1, math.nan, 1), (1, -1, 1)):
        with pytest.raises(MedicalDataError, match="'x' has the spacing"):
            Volume(image, None, spacing, None, "x")


def dicom_series(folder: Path, values: np.ndarray, *, turn: np.ndarray | None = None, **tags) -> list[Path]:
    """Write (D, H, W) as CT slices with names in no order; `tags` go to every slice."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = (np.eye(3) if turn is None else turn).T
    series = pydicom.uid.generate_uid()
    paths = []
    for number, pixels in enumerate(values):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
        data.SeriesInstanceUID, data.Modality, data.InstanceNumber = series, "CT", number + 1
        data.Rows, data.Columns = pixels.shape
        data.PixelSpacing, data.SliceThickness = [1.5, 0.8], 4.0
        data.ImageOrientationPatient = [round(float(value), 6) for value in (*axes[0], *axes[1])]
        data.ImagePositionPatient = [round(float(v), 6) for v in np.array([-20.0, 10, 5]) + 4.0 * number * axes[2]]
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = (pixels.astype(np.int32) + 1024).astype(np.uint16).tobytes()
        for name, value in tags.items():
            setattr(data, name, value)
        paths.append(folder / f"{(number * 7) % 11:02d}.dcm")
        data.save_as(paths[-1], enforce_file_format=True)
    return paths


def edit(path: Path, **tags) -> None:
    data = pydicom.dcmread(path)
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(path)


@pytest.mark.filterwarnings("ignore:Failed to read")  # MONAI takes every file for a slice
@pytest.mark.parametrize("degrees", [(0, 0, 0), (10, -8, 5)])
def test_dicom_series(tmp_path, degrees):
    values = voxels(shape=(5, 9, 7))
    dicom_series(tmp_path / "series", values, turn=rotation(*degrees))
    (tmp_path / "series" / "notes.txt").write_text("not DICOM")
    volume = read_volume(tmp_path / "series")
    assert volume.case == "series" and np.array_equal(volume.image[:, 0], values)  # Hounsfield units, LPS as stored
    assert volume.spacing == pytest.approx((4, 1.5, 0.8), rel=1e-4)
    image_reader = pytest.importorskip("monai.data.image_reader")
    reader = image_reader.PydicomReader()
    array, meta = reader.get_data(reader.read(tmp_path / "series"))
    assert np.allclose(volume.grid.affine, meta["affine"], atol=1e-4)
    assert np.array_equal(array, read_dicom(tmp_path / "series")[0])
    write_nifti(tmp_path / "mask.nii.gz", (volume.image[:, 0] > 0).astype(np.uint8), volume)
    pair = read_volume(tmp_path / "series", tmp_path / "mask.nii.gz")
    assert np.array_equal(pair.mask, values > 0)


def test_dicom_single_slices_and_reversed_series(tmp_path):
    values = voxels(shape=(5, 9, 7))
    dicom_series(tmp_path / "one", values[:1])
    assert read_volume(tmp_path / "one").spacing == pytest.approx((4, 1.5, 0.8))
    edit(tmp_path / "one" / "00.dcm", SliceThickness=None)
    with pytest.warns(UserWarning, match="1 mm is taken"):
        assert read_volume(tmp_path / "one").spacing[0] == 1
    for number, path in enumerate(dicom_series(tmp_path / "down", values)):  # numbered from head to foot
        edit(path, InstanceNumber=5 - number)
    assert np.array_equal(read_volume(tmp_path / "down").image[:, 0], values)


BAD_DICOM = [
    (lambda paths: paths[2].unlink(), "are 8 mm apart, the others 4 mm: a slice is missing"),
    (lambda paths: edit(paths[1], ImagePositionPatient=[-20, 10, 5]), "lie at the same place"),
    (lambda paths: edit(paths[1], SeriesInstanceUID=pydicom.uid.generate_uid()), "holds 2 series"),
    (lambda paths: edit(paths[1], ImagePositionPatient=None), "lacks ImagePositionPatient"),
    (lambda paths: edit(paths[1], PixelSpacing=[1.5, 0.9]), "differ in PixelSpacing"),
    (lambda paths: edit(paths[1], ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "differ in ImageOrientationPatient"),
    (lambda paths: edit(paths[0], NumberOfFrames=3), "multi-frame"),
    (lambda paths: edit(paths[0], PhotometricInterpretation="RGB", SamplesPerPixel=3), "stored as RGB"),
    (lambda paths: edit(paths[0], PixelData=b"\0" * 10), "cannot decode the pixels"),
    (lambda paths: paths[0].write_bytes(b"junk" * 50), "cannot read DICOM file"),
    (lambda paths: [edit(path, PixelSpacing=[0, 0.8]) for path in paths], "spacing of 0.8 x 0 x 4 mm"),
]


@pytest.mark.parametrize("spoil, message", BAD_DICOM)
def test_dicom_series_that_are_refused(tmp_path, spoil, message):
    spoil(dicom_series(tmp_path / "series", voxels(shape=(5, 9, 7))))
    with pytest.raises(MedicalDataError, match=message) as caught:
        read_volume(tmp_path / "series")
    assert "series" in str(caught.value)


def test_arrays(tmp_path):
    image, label = np.random.rand(4, 5).astype(np.float32), np.zeros((4, 5), np.uint8)
    np.savez(tmp_path / "a.npz", image=image, label=label)
    with h5py.File(tmp_path / "a.npy.h5", "w") as file:
        file["image"], file["label"] = image, label
        file.attrs["spacing"] = [3.0, 1, 1]
    for name in ("a.npz", "a.npy.h5"):
        found = read_arrays(tmp_path / name, ("image", "label"))
        assert np.array_equal(found["image"], image) and ("spacing" in found) == (name == "a.npy.h5")
        with pytest.raises(MedicalDataError, match=r"has no array 'img'; it holds image, label. Expected: img, label"):
            read_arrays(tmp_path / name, ("img", "label"))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
        with pytest.raises(MedicalDataError, match=f"cannot read .*{name}"):
            read_arrays(tmp_path / name, ("image", "label"))
        with pytest.raises(MedicalDataError, match="there is no file"):
            read_arrays(tmp_path / "absent" / name, ("image",))
    assert [stem_of(name) for name in ("a.nii.gz", "a.NII", "a.npy.h5", "a.b.npz")] == ["a", "a", "a", "a.b"]


def test_pickled_objects_are_never_loaded(tmp_path):
    class Call:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    np.savez(tmp_path / "a.npz", image=np.array([Call()], dtype=object), label=np.zeros(3))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Call()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(MedicalDataError, match="never loaded"):
            read_arrays(tmp_path / name, ("image", "label"))


def test_intensities():
    image = np.array([-1000.0, -125, 75, 275, 1200], dtype=np.float32).reshape(1, 1, 1, 5)
    volume = Volume(image, None, (1, 1, 1), None, "x")
    assert scale_intensities(volume, (-125, 275), "x.nii").image.ravel().tolist() == [0, 0, 0.5, 1, 1]
    rising = Volume(np.linspace(0, 1000, 1001, dtype=np.float32).reshape(1, 1, 7, 143), None, (1, 1, 1), None, "x")
    scaled = scale_intensities(rising, None, "x.nii").image
    assert scaled.min() == 0 and scaled.max() == 1 and scaled.ravel()[500] == pytest.approx(0.5)
    with pytest.raises(MedicalDataError, match="one value almost everywhere, 5"):
        scale_intensities(Volume(image * 0 + 5, None, (1, 1, 1), None, "x"), None, "x.nii")
    with pytest.raises(ValueError, match="low < high"):
        Reading(window=(275, -125))
    for low, high, hint in ((0, 3071, "unsigned"), (0, 1, "scaled already"), (0, 255, "8-bit grey"), (-1, 1, "scaled")):
        with pytest.raises(MedicalDataError, match=rf"'x.nii' has intensities from {low} to {high}, .*{hint}"):
            check_hounsfield(np.array([low, high]), "x.nii")
    assert scale_intensities(Volume(abs(image), None, (1, 1, 1), None, "x"), (-125, 275), "x", check_units=False)
    check_range(np.array([0, 1.0]), "x", 0, 1)
    with pytest.raises(MedicalDataError, match=r"from -3 to 1; this set is scaled to \[0, 1\]"):
        check_range(np.array([-3, 1.0]), "x.npz", 0, 1)


def test_cases_of_a_folder(tmp_path):
    for number in (1, 2):
        for channel in (0, 1):
            save(tmp_path / "a" / "imagesTr" / f"case{number}_000{channel}.nii.gz", voxels())
        save(tmp_path / "a" / "labelsTr" / f"case{number}.nii.gz", voxels() * 0)
    cases = find_cases(tmp_path / "a")
    assert [(case.name, len(case.images), case.mask.name) for case in cases] == [
        ("case1", 2, "case1.nii.gz"), ("case2", 2, "case2.nii.gz"),
    ]
    assert Reading().volume(cases[0]).image.shape == (5, 2, 9, 7)
    dicom_series(tmp_path / "b" / "images" / "p_0001", voxels(shape=(5, 9, 7)))
    series = read_volume(tmp_path / "b" / "images" / "p_0001")
    mask = (series.image[:, 0] > 0).astype(np.uint8)
    write_nifti(tmp_path / "b" / "masks" / "p_0001.nii.gz", mask, series)  # the number belongs to the name here
    assert [case.name for case in find_cases(tmp_path / "b")] == ["p_0001"]
    slices = NiftiSlices(tmp_path / "b", "all", classes=("background", "x"), window=(-125, 275))
    assert len(slices) == 5 and np.array_equal(slices[2]["mask"], mask[2])
    volume = NiftiVolumes(tmp_path / "b", "all", classes=("background", "x"), window=(-125, 275))[0]["volume"]
    assert np.array_equal(slices[2]["image"], volume.image[2]) and np.array_equal(volume.mask, mask)
    (tmp_path / "a" / "imagesTr" / "case2_0001.nii.gz").unlink()
    with pytest.raises(MedicalDataError, match="1 to 2 channels; channels are missing of case2"):
        find_cases(tmp_path / "a")
    (tmp_path / "a" / "imagesTr" / "case2_0000.nii.gz").unlink()
    with pytest.raises(MedicalDataError, match="1 label maps in .* have no image: case2"):
        find_cases(tmp_path / "a")
    (tmp_path / "a" / "labelsTr" / "case1.nii.gz").rename(tmp_path / "a" / "labelsTr" / "other.nii.gz")
    with pytest.raises(MedicalDataError, match="1 images in .* have no label map: case1; 2 label maps"):
        find_cases(tmp_path / "a")
    for folder, message in (("absent", "does not exist"), ("a/imagesTr", "does not hold the folders 'imagesTr'")):
        with pytest.raises(MedicalDataError, match=message):
            find_cases(tmp_path / folder)
    with pytest.raises(MedicalDataError, match="'imagesTs' and 'labelsTs'"):
        find_cases(tmp_path / "a", test=True)


def test_what_is_missing_says_how_to_install():
    with pytest.raises(ImportError, match=r"medical data need nibabell: pip install 'vision_ssm\[medical\]'"):
        optional("nibabell.orientations")


def test_slices_keep_their_border():
    """SciPy's zoom reads the last row of 512 pixels a rounding error outside of the slice, at 224."""
    image, mask = zoom_pair(np.ones((1, 512, 512), np.float32), np.ones((512, 512), np.int64), (224, 224))
    np.testing.assert_allclose(image, 1, rtol=1e-5)
    assert mask.min() == 1
