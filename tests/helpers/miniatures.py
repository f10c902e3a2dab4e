"""The paper's eight data sets in small: the layouts in which their owners distribute them, with their traps."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from fpt_lightning.data.images import read_image
from fpt_lightning.errors import ImageError

GRADES = ("no DR", "mild NPDR", "moderate NPDR", "severe NPDR", "PDR")


class Miniature:
    """A data set being written, and what a recipe must make of it.

    ``lines`` are (image, label, split, group) of the manifest in ascending order, with an empty split where it is
    drawn; ``left_out`` is how the reason for each image left out begins.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[tuple[str, str, str, str]] = []
        self.left_out: dict[str, str] = {}
        self.drawn = 0

    def picture(self, id: str, mode: str = "RGB") -> Path:
        """A picture like no other, by its suffix."""
        self.drawn += 1
        path = self.path(id)
        pixels = np.random.default_rng(self.drawn).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path, "PNG" if path.suffix.lower() == ".png" else "JPEG")
        return path

    def keep(self, id: str, label: str, split: str = "", group: str = "", mode: str = "RGB") -> None:
        self.picture(id, mode)
        self.line(id, label, split, group)

    def line(self, id: str, label: str, split: str = "", group: str = "") -> None:
        self.lines = sorted([*self.lines, (id, label, split, group)])

    def leave(self, id: str, reason: str) -> None:
        self.picture(id)
        self.left_out[id] = reason

    def truncate(self, id: str) -> None:
        """A picture that does not open."""
        path = self.picture(id)
        path.write_bytes(path.read_bytes()[:100])
        self.left_out[id] = "unreadable: the image "

    def copy(self, id: str, new: str, reason: str) -> None:
        """A file once more under another name."""
        shutil.copy(self.root / id, self.path(new))
        self.left_out[new] = reason

    def text(self, id: str, lines: Sequence[str], encoding: str = "utf-8") -> None:
        self.path(id).write_text("\n".join(lines), encoding)

    def path(self, id: str) -> Path:
        path = self.root / id
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def ddr(m: Miniature) -> None:
    """One folder deeper; upper-case suffixes, grade 5, copies in another split and with another grade."""
    folder = "DDR-dataset/DR_grading"
    for part, split in {"test": "test", "valid": "val", "train": "train"}.items():
        rows = []
        for number in range(20 if part == "train" else 10):
            name = f"007-{number:04d}-0{len(part)}0.jpg" if number % 2 else f"2017041310262{number:02d}{len(part)}.JPG"
            m.keep(f"{folder}/{part}/{name}", GRADES[number % 5], split)
            rows.append(f"{Path(name).stem}.jpg {number % 5}")
        if part == "train":
            m.leave(f"{folder}/train/bad.jpg", "ungradable (grade 5)")
            m.truncate(f"{folder}/train/short.jpg")
            m.copy(
                f"{folder}/test/007-0001-040.jpg", f"{folder}/train/again.jpg", "copy: the same file as DDR-dataset/"
            )
            m.leave(f"{folder}/train/here.jpg", "contradicting copies: ")
            m.copy(f"{folder}/train/here.jpg", f"{folder}/train/there.jpg", "contradicting copies: ")
            rows += ["bad.jpg 5", "short.jpg 0", "again.jpg 1", "here.jpg 1", "there.jpg 2"]
        elif part == "valid":
            m.left_out[f"{folder}/valid/gone.jpg"] = "a row in valid.txt, but no file"
            rows.append("gone.jpg 0")
        m.text(f"{folder}/{part}.txt", [*rows, ""])
        if part == "valid":
            m.leave(f"{folder}/valid/stray.jpg", "no row in valid.txt")
    m.picture("DDR-dataset/lesion_segmentation/train/image/007-0001-050.jpg")
    m.picture("__MACOSX/DR_grading/train/other.jpg")


def messidor2(m: Miniature) -> None:
    """Names that differ in case, a blank after the header's last name, four images without a grade."""
    pairs, grades = ["left;right "], ["image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"]
    for number in range(50):
        left, right = f"20051020_{43800 + number}_0100_PP.png", f"20051020_{53800 + number}_0100_PP.png"
        if number % 2:
            left, right = f"IM{number:06d}.JPG", f"IM{number + 100:06d}.JPG"
        pairs.append(f"{left};{right}")
        for name in (left, right):
            m.keep(f"IMAGES/{name}", GRADES[number % 5], group=left)
            grades.append(f"{name.replace('JPG', 'jpg')},{number % 5},0,1")
    m.leave("IMAGES/IM000900.JPG", "ungradable (no adjudicated grade)")
    m.leave("IMAGES/IM000901.JPG", "no row in messidor-2.csv")
    m.leave("IMAGES/IM000902.JPG", "no row in messidor_data.csv")
    m.truncate("IMAGES/IM000903.JPG")
    m.left_out["IMAGES/IM000904.jpg"] = "a row in messidor_data.csv, but no file"
    pairs += ["IM000900.JPG;IM000902.JPG", "IM000903.JPG;IM000904.JPG", ""]
    grades += ["IM000900.jpg,,,0", "IM000901.jpg,1,0,1", "IM000903.jpg,1.0,0,1", "IM000904.jpg,1,0,1"]
    m.text("messidor-2.csv", pairs)
    m.text("messidor_data.csv", grades, encoding="utf-8-sig")


def isic2018(m: Miniature) -> None:
    """Doubled folders, tables in folders of their names, an altered order of columns, the synthetic test image."""
    classes = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    lesions = ["image,lesion_id,diagnosis_confirm_type"]
    for offset, (part, split) in enumerate({"Training": "train", "Validation": "val", "Test": "test"}.items()):
        folder, table = f"ISIC2018_Task3_{part}_Input", f"ISIC2018_Task3_{part}_GroundTruth"
        inner = f"{folder}/{folder}" if part == "Training" else folder
        order = sorted(classes) if part == "Test" else classes
        rows = [f"image,{','.join(order)}"]
        for number in range(14):
            name, label = f"ISIC_{24300 + 100 * offset + number:07d}", classes[number % 7]
            lesion = f"HAM_{number % 7:07d}" if part == "Training" else ""
            m.keep(f"{inner}/{name}.jpg", label, split, lesion)
            rows.append(f"{name},{','.join('1.0' if c == label else '0.0' for c in order)}")
            lesions += [f"{name},{lesion},histopathology"] if lesion else []
        if part == "Training":
            m.copy(f"{inner}/ISIC_0024301.jpg", f"{inner}/ISIC_0029861.jpg", "copy: the same file as ")
            m.leave(f"{inner}/ISIC_0029999.jpg", "no row in ISIC2018_Task3_Training_LesionGroupings.csv")
            rows += [f"ISIC_00{number},0.0,1.0,0.0,0.0,0.0,0.0,0.0" for number in (29861, 29999)]
            lesions.append("ISIC_0029861,HAM_0000001,histopathology")
        if part == "Test":
            m.leave(f"{inner}/ISIC_0035068.jpg", "synthetic: not scored by the organisers")
            rows.append("ISIC_0035068,0,0,0,0,0,1,0")
        m.text(f"{table}/{table}.csv", rows)
        m.text(f"{folder}/ATTRIBUTION.txt", ["cite"])
    m.text("ISIC2018_Task3_Training_LesionGroupings.csv", lesions)


def isic2016(m: Miniature) -> None:
    """Tables without headers, words in one and numbers in the other, no validation images."""
    for part, split in {"Training": "train", "Test": "test"}.items():
        folder, labels = f"ISBI2016_ISIC_Part3_{part}_Data", ("benign", "malignant")
        written = labels if part == "Training" else ("0.0", "1.0")
        rows = []
        for number in range(24 if part == "Training" else 10):
            name = f"ISIC_{number + 100 * len(part):07d}"
            m.keep(f"{folder}/{name}.jpg", labels[number % 2], split)
            rows.append(f"{name},{written[number % 2]}")
        m.truncate(f"{folder}/ISIC_0009999.jpg")
        m.text(f"ISBI2016_ISIC_Part3_{part}_GroundTruth.csv", [*rows, f"ISIC_0009999,{written[0]}"])


def ddsm(m: Miniature) -> None:
    """Masks in mixed case beside the images, other files, the same case number in two classes."""
    folder = "MINI-DDSM-Complete-JPEG-8"
    for letter, label in {"A": "Normal", "B": "Benign", "C": "Cancer"}.items():
        for case in range(1, 11):
            for view in ("LEFT_CC", "RIGHT_MLO"):
                stem = f"{folder}/{label}/{case:04d}/{letter}_{case:04d}_1.{view}"
                m.keep(f"{stem}.jpg", label, group=f"{letter}_{case:04d}", mode="L")
                if case == 1 and letter == "C":
                    for mask in (f"{stem}_Mask", f"{stem}_MASK2", stem.replace(".LEFT", "_Mask.LEFT")):
                        m.picture(f"{mask}.jpg", mode="L")
                    m.text(f"{stem}.OVERLAY", ["TOTAL_ABNORMALITIES 1"])
    m.truncate(f"{folder}/Cancer/0099/C_0099_1.LEFT_CC.jpg")
    m.leave(f"{folder}/Benign/0001/preview.jpg", "not named as a mammogram")
    m.text(f"{folder}/DataWMask.xlsx", ["not read"])


def cmmd(m: Miniature) -> None:
    """Sides in headers only; unlabelled breasts, a row without an image, a file that is not DICOM."""
    rows: list[list[object]] = [["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]]
    folder = "manifest-1616439774456/CMMD"
    for number in range(1, 21):
        patient, label = f"D1-{number:04d}", ("Benign", "Malignant")[number % 2]
        for position, side in enumerate("LR", start=1):
            id = f"{folder}/{patient}/07-18-2010-NA-NA-79377/1.000000-NA-70244/1-{position}.dcm"
            write_dicom(m.path(id), patient, side, seed=10 * number + position)
            if side == "R" or number % 5 == 0:
                rows.append([patient, side, 40 + number, 2, "mass", label])
                m.line(id, label.lower(), group=patient)
            else:
                m.left_out[id] = "unlabelled (its breast has no row in "
    rows.append(["D2-0001", "R", 50, 2, "mass", "Benign", "Luminal A"])
    m.left_out["D2-0001 R"] = "a row in CMMD_clinicaldata_revision.xlsx, but no image"
    m.text(f"{folder}/D1-0001/LICENSE", ["CC BY 4.0"])
    m.left_out[f"{folder}/D1-0001/LICENSE"] = "unreadable DICOM header: InvalidDicomError"
    write_dicom(m.path(f"{folder}/D1-0002/1-9.dcm"), "D1-0002", "", seed=1)
    m.left_out[f"{folder}/D1-0002/1-9.dcm"] = "no PatientID or ImageLaterality in its header"
    write_xlsx(m.root / "CMMD_clinicaldata_revision.xlsx", rows)


def covid(m: Miniature) -> None:
    """Any suffix, grey and coloured files, a file that is no image, copies within and across the classes."""
    for label in ("covid", "normal", "virus"):
        for number in range(10):
            suffix = (".jpg", ".jfif", ".PNG", ".jpeg")[number % 4]
            m.keep(f"COVID_IEEE/{label}/{label} ({number}){suffix}", label, mode="L" if number % 3 else "RGB")
    m.copy(
        "COVID_IEEE/covid/covid (0).jpg", "COVID_IEEE/covid/new.jpg", "copy: the same file as COVID_IEEE/covid/covid"
    )
    m.leave("COVID_IEEE/normal/x.jpg", "contradicting copies: among the same files with different classes, such as ")
    m.copy("COVID_IEEE/normal/x.jpg", "COVID_IEEE/virus/y.jpeg", "contradicting copies: ")
    m.text("COVID_IEEE/virus/Thumbs.db", ["thumbs"])
    m.left_out["COVID_IEEE/virus/Thumbs.db"] = "unreadable: the image COVID_IEEE/virus/Thumbs.db cannot be read"


def chncxr(m: Miniature) -> None:
    """Two folders deeper, palettes, masks and Montgomery images beside the images."""
    folder = "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png"
    for number in range(1, 41):
        tb = number > 20
        m.keep(
            f"{folder}/CHNCXR_{number:04d}_{int(tb)}.png", "tuberculosis" if tb else "normal", mode="P" if tb else "RGB"
        )
    m.truncate(f"{folder}/CHNCXR_0100_1.png")
    m.leave(f"{folder}/MCUCXR_0001_0.png", "not named as an X-ray of this data set")
    for mask in ("CHNCXR_0001_0_mask.png", "mask_CHNCXR_0002_0.png", "CHNCXR_0003_0-MASK2.png"):
        m.picture(f"{folder}/{mask}", mode="L")
    m.text(f"{folder}/Thumbs.db", ["thumbs"])
    m.text("ChinaSet_AllFiles/ChinaSet_AllFiles/ClinicalReadings/CHNCXR_0001_0.txt", ["male 45yrs", "normal"])


MINIATURES: dict[str, Callable[[Miniature], None]] = {
    writer.__name__: writer for writer in (ddr, messidor2, isic2018, isic2016, ddsm, cmmd, covid, chncxr)
}


def build(name: str, root: Path) -> Miniature:
    miniature = Miniature(root)
    MINIATURES[name](miniature)
    return miniature


def write_dicom(path: Path, patient: str, side: str, seed: int) -> None:
    """A small mammogram of 8 bits; without a side if it is empty."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    data.SOPInstanceUID = generate_uid(entropy_srcs=[str(path.name), str(seed)])
    data.PatientID = patient
    if side:
        data.ImageLaterality = side
    data.Rows, data.Columns, data.SamplesPerPixel = 24, 16, 1
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.PhotometricInterpretation = 7, 0, "MONOCHROME2"
    data.PixelData = np.random.default_rng(seed).integers(0, 256, (24, 16), dtype=np.uint8).tobytes()
    data.save_as(path, enforce_file_format=True)


def reads_dicom(folder: Path) -> bool:
    """Whether ``read_image`` reads DICOM."""
    write_dicom(folder / "try.dcm", "D1-0001", "L", seed=0)
    try:
        read_image(folder / "try.dcm")
    except ImageError:
        return False
    return True


SHEET = (
    '<?xml version="1.0"?><{tag} xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"{more}>{body}</{tag}>'
)
LINKS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def write_xlsx(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """A spreadsheet whose first sheet has these rows: the first as shared texts, texts below it in their cells."""

    def cell(value: object, row: int, column: int) -> str:
        where = f"{chr(ord('A') + column)}{row}"
        if row == 1:
            return f'<c r="{where}" t="s"><v>{column}</v></c>'
        if isinstance(value, str):
            return f'<c r="{where}" t="inlineStr"><is><t>{escape(value)}</t></is></c>'
        return f'<c r="{where}"><v>{value}</v></c>'

    lines = "".join(
        f'<row r="{number}">{"".join(cell(value, number, column) for column, value in enumerate(row))}</row>'
        for number, row in enumerate(rows, start=1)
    )
    shared = "".join(
        f"<si><r><t>{escape(str(text)[:1])}</t></r><r><t>{escape(str(text)[1:])}</t></r></si>" for text in rows[0]
    )
    sheets = '<sheets><sheet name="Data" sheetId="1" r:id="rId7"/></sheets>'
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", SHEET.format(tag="workbook", more=f' xmlns:r="{LINKS}"', body=sheets))
        archive.writestr(
            "xl/_rels/workbook.xml.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            '<Relationship Id="rId7" Target="worksheets/first.xml"/></Relationships>',
        )
        archive.writestr(
            "xl/worksheets/first.xml", SHEET.format(tag="worksheet", more="", body=f"<sheetData>{lines}</sheetData>")
        )
        archive.writestr("xl/sharedStrings.xml", SHEET.format(tag="sst", more="", body=shared))
