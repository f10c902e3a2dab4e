"""The paper's eight data sets as their owners list them: file names, tables and published counts, at any share.

The images are tiny: an encoded template with a number of its own (a JPEG comment, a PNG text chunk, the last pixels of
a DICOM file), so that no two have the same bytes unless the owners' have. Counts are the published ones, as the modules
of ``fpt_lightning.datasets`` cite them; where nothing is published, the writer of the data set says so. Which image has
which label is drawn by seed.
"""

from __future__ import annotations

import datetime
import io
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from miniatures import GRADES, write_dicom, write_xlsx

FEW = 4  # images of a class or split that the smallest share keeps, or all where there are fewer


class Listing:
    """A data set being written, and what ``prepare`` must make of it.

    Attributes:
        images: that are written and count as published.
        usable: images by official split (empty where there is none) and class.
        left_out: files by how the reason begins.
        groups: of the usable images.
    """

    def __init__(self, root: Path, share: float, seed: int) -> None:
        self.root, self.share, self.random = root, share, random.Random(seed)
        self.images = 0
        self.usable: Counter[tuple[str, str]] = Counter()
        self.left_out: Counter[str] = Counter()
        self.groups: set[str] = set()
        self._written = 0

    def scaled(self, count: int) -> int:
        return min(count, max(FEW, round(count * self.share)))

    def labels(self, counts: Mapping[str, int]) -> list[str]:
        """The share of each label, in random order."""
        labels = [label for label, count in counts.items() for _ in range(self.scaled(count))]
        self.random.shuffle(labels)
        return labels

    def keep(self, id: str, label: str, split: str = "", group: str = "", mode: str = "RGB") -> None:
        self.picture(id, mode)
        self.count(label, split, group)

    def count(self, label: str, split: str = "", group: str = "") -> None:
        self.images += 1
        self.usable[split, label] += 1
        self.groups |= {group} - {""}

    def leave(self, id: str, reason: str) -> None:
        self.picture(id)
        self.count_out(reason)

    def count_out(self, reason: str) -> None:
        self.images += 1
        self.left_out[reason] += 1

    def copy(self, id: str, new: str) -> None:
        """An image whose bytes another has."""
        self.path(new).write_bytes((self.root / id).read_bytes())
        self.count_out("copy: the same file as ")

    def picture(self, id: str, mode: str = "RGB") -> None:
        self._written += 1
        self.path(id).write_bytes((png if id.lower().endswith(".png") else jpeg)(mode, self._written))

    def text(self, id: str, lines: Sequence[str], encoding: str = "utf-8") -> None:
        self.path(id).write_text("\n".join([*lines, ""]), encoding)

    def path(self, id: str) -> Path:
        path = self.root / id
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@cache
def template(kind: str, mode: str) -> bytes:
    """8 x 8 pixels, encoded."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def jpeg(mode: str, number: int) -> bytes:
    content, comment = template("JPEG", mode), b"%08d" % number
    at = 4 + int.from_bytes(content[4:6], "big")  # the end of its JFIF header
    return content[:at] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + content[at:]


def png(mode: str, number: int) -> bytes:
    content, chunk = template("PNG", mode), b"tEXtComment\0%08d" % number
    at = 8 + 25  # the signature and IHDR
    length, check = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
    return content[:at] + length + chunk + check + content[at:]


DDR = {
    "train": (3133, 315, 2238, 118, 456, 575),
    "valid": (1253, 126, 895, 47, 182, 230),
    "test": (1880, 189, 1344, 71, 275, 346),
}


def ddr(m: Listing) -> None:
    """Names of two forms, whose shares are not published (here one half each); images for other tasks beside them."""
    folder, names = "DDR-dataset/DR_grading", ddr_names(m.random)
    for part, counts in DDR.items():
        rows = []
        for grade in m.labels({str(grade): count for grade, count in enumerate(counts)}):
            name = next(names)
            if grade == "5":
                m.leave(f"{folder}/{part}/{name}", "ungradable (grade 5)")
            else:
                m.keep(f"{folder}/{part}/{name}", GRADES[int(grade)], "val" if part == "valid" else part)
            rows.append(f"{name} {grade}")
        m.text(f"{folder}/{part}.txt", rows)
        m.picture(f"DDR-dataset/lesion_segmentation/{part}/image/{rows[0].split()[0]}")


def ddr_names(draw: random.Random) -> Iterator[str]:
    taken, number = datetime.datetime(2016, 6, 6, 14, 51, 27), 3
    while True:
        number += 1
        yield f"007-{number // 2:04d}-{number % 2}00.jpg"
        taken += datetime.timedelta(milliseconds=draw.randrange(1, 10**7))
        yield f"{taken:%Y%m%d%H%M%S}{taken.microsecond // 1000:03d}.jpg"


def messidor2(m: Listing) -> None:
    """529 examinations in PNG, 345 in JPEG with another case in the table; a blank after a header.

    Which numbers make a pair, and whose four images have no grade, is drawn.
    """
    grades = m.labels({"0": 1017, "1": 270, "2": 347, "3": 75, "4": 35, "": 4})
    grades += ["0"] * (len(grades) % 2)
    in_png = round(len(grades) / 2 * 529 / 874)
    names = messidor2_names(m.random, in_png, len(grades) // 2 - in_png)
    pairs, rows = ["left;right "], ["image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"]
    for left, right in zip(names[::2], names[1::2], strict=True):
        pairs.append(f"{left};{right}")
        for name in (left, right):
            grade = grades.pop()
            if grade:
                m.keep(f"IMAGES/{name}", GRADES[int(grade)], group=left)
            else:
                m.leave(f"IMAGES/{name}", "ungradable (no adjudicated grade)")
            rows.append(f"{name.replace('.JPG', '.jpg')},{grade},{'0,1' if grade else ',0'}")
    m.text("messidor-2.csv", pairs)
    m.text("messidor_data.csv", rows)
    m.text("messidor_readme.txt", ["Columns: image_id, adjudicated_dr_grade, ..."])


def messidor2_names(draw: random.Random, in_png: int, in_jpeg: int) -> list[str]:
    first = [f"200510{20 + n % 8}_{n}_0100_PP.png" for n in draw.sample(range(33_000, 64_000), 2 * in_png)]
    return first + [f"IM{number:06d}.JPG" for number in draw.sample(range(1, 4833), 2 * in_jpeg)]


ISIC2018 = {
    "Training": ("train", 24306, (1113, 6705, 514, 327, 1099, 115, 142)),
    "Validation": ("val", 34321, (21, 123, 15, 8, 22, 1, 3)),
    "Test": ("test", 34524, (171, 908, 93, 43, 217, 44, 35)),
}  # by folder: split, number of the first image, images by class without the synthetic one
CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
LESIONS = dict(zip(CLASSES, (614, 5403, 327, 228, 727, 73, 98), strict=True))
SYNTHETIC = 35068
IDENTICAL = 2  # pairs of training images


def isic2018(m: Listing) -> None:
    """Archives unpacked into folders of their names; one synthetic image, two pairs of identical ones.

    Lesions by class are those of HAM10000; validation and test images by class are as commonly cited, and add up to the
    published 193 and 1,512. Not known here: the numbers that the validation images skip (here none), the class of the
    synthetic image (here one of 909 NV), which images are the pairs (here NV of one lesion) and how many images each
    lesion has (here about as many as others of its class).
    """
    for part, (split, first, counts) in ISIC2018.items():
        folder, table = f"ISIC2018_Task3_{part}_Input", f"ISIC2018_Task3_{part}_GroundTruth"
        inner = f"{folder}/{folder}" if part == "Training" else folder
        labels = m.labels(dict(zip(CLASSES, counts, strict=True)))
        numbers = (number for number in range(first, first + len(labels) + 1) if number != SYNTHETIC)
        named = {f"ISIC_{number:07d}": label for number, label in zip(numbers, labels, strict=False)}
        rows = [f"image,{','.join(CLASSES)}", *(one_hot(name, label) for name, label in named.items())]
        if part == "Training":
            isic2018_training(m, inner, named)
        else:
            for name, label in named.items():
                m.keep(f"{inner}/{name}.jpg", label, split)
        if part == "Test":
            m.leave(f"{inner}/ISIC_{SYNTHETIC:07d}.jpg", "synthetic: not scored by the organisers")
            rows.append(one_hot(f"ISIC_{SYNTHETIC:07d}", "NV"))
        m.text(f"{table}/{table}.csv", [rows[0], *sorted(rows[1:])])
        for below in (inner, table):
            m.text(f"{below}/ATTRIBUTION.txt", ["HAM10000"])
            m.text(f"{below}/LICENSE.txt", ["CC BY-NC 4.0"])


def one_hot(name: str, label: str) -> str:
    return f"{name},{','.join('1.0' if label == column else '0.0' for column in CLASSES)}"


def isic2018_training(m: Listing, folder: str, named: Mapping[str, str]) -> None:
    rows, seen, firsts = ["image,lesion_id,diagnosis_confirm_type"], Counter[str](), dict[str, str]()
    copies = IDENTICAL
    for name, label in named.items():
        lesion = f"HAM_{10_000 * CLASSES.index(label) + seen[label] % m.scaled(LESIONS[label]):07d}"
        seen[label] += 1
        if copies and label == "NV" and lesion in firsts:
            m.copy(f"{folder}/{firsts[lesion]}.jpg", f"{folder}/{name}.jpg")
            copies -= 1
        else:
            m.keep(f"{folder}/{name}.jpg", label, "train", lesion)
        firsts.setdefault(lesion, name)
        rows.append(f"{name},{lesion},{'histopathology' if label != 'NV' else 'serial imaging showing no change'}")
    m.text("ISIC2018_Task3_Training_LesionGroupings.csv", rows)


def isic2016(m: Listing) -> None:
    """Tables without a header, in words and in numbers; the numbers of both parts are of one range, here drawn."""
    parts = {"Training": ("train", 900, 173), "Test": ("test", 379, 75)}
    numbers = m.random.sample(range(11_403), 1_279)
    for part, (split, images, malignant) in parts.items():
        folder, rows = f"ISBI2016_ISIC_Part3_{part}_Data", []
        labels = m.labels({"benign": images - malignant, "malignant": malignant})
        for number, label in zip(sorted(numbers.pop() for _ in labels), labels, strict=True):
            m.keep(f"{folder}/{folder}/ISIC_{number:07d}.jpg", label, split)
            written = label if part == "Training" else {"benign": "0.0", "malignant": "1.0"}[label]
            rows.append(f"ISIC_{number:07d},{written}")
        m.text(f"ISBI2016_ISIC_Part3_{part}_GroundTruth.csv", rows)


def ddsm(m: Listing) -> None:
    """Four views a case; letters stand for scanners, not classes. Masks beside one breast of each case with a lesion.

    Published are images by class, all multiples of four. Not published: the number of masks and which views have a
    second one (here of every tenth case), and which number is of which class.
    """
    folder = "MINI-DDSM-Complete-JPEG-8"
    scanners = {"A": range(1_000, 2_000), "B": range(3_000, 3_700), "C": range(1, 500), "D": range(4_000, 4_700)}
    cases = [(letter, number) for letter, numbers in scanners.items() for number in numbers]
    m.random.shuffle(cases)
    for label, images in {"Normal": 2408, "Benign": 2684, "Cancer": 2716}.items():
        for _ in range(m.scaled(images // 4)):
            letter, number = cases.pop()
            case = f"{letter}_{number:04d}"
            stem = f"{folder}/{label}/{number:04d}/{case}_1."
            for view in ("LEFT_CC", "LEFT_MLO", "RIGHT_CC", "RIGHT_MLO"):
                m.keep(f"{stem}{view}.jpg", label, group=case, mode="L")
            for view in ("LEFT_CC", "LEFT_MLO") if label != "Normal" else ():
                for mask in ("_Mask", "_MASK2") if number % 10 == 0 else ("_Mask",):
                    m.picture(f"{stem}{view}{mask}.jpg", mode="L")
    m.text(f"{folder}/DataWMask.xlsx", ["not read"])


def cmmd(m: Listing) -> None:
    """1,872 rows for 1,775 patients and 2,601 breasts of two images each, so 97 patients have rows for both breasts.

    The 749 patients D2 have molecular subtypes, so are malignant. Some patients have one benign and one malignant
    breast, as D1-0087 has. Not known here: benign and malignant images (here 1,112 and 2,632), where the 729 breasts
    without a row are (here D2), the sides, the numbers that D1 skips (here none; public readers have D1-1042).
    """
    d1, d2, both, benign = m.scaled(1026), m.scaled(749), m.scaled(97), m.scaled(556)
    labels = ["Benign"] * benign + ["Malignant"] * (d1 + both - benign)
    m.random.shuffle(labels)
    labels = ["Malignant"] * d2 + labels
    rows: list[list[object]] = [["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]]
    folder, content = "manifest-1616439774456/CMMD", dicom(m)
    for position in range(d1 + d2):
        patient = f"D1-{position + 1:04d}" if position < d1 else f"D2-{position - d1 + 1:04d}"
        sides = m.random.sample("LR", 2)
        label_of = {side: labels.pop() for side in (sides if position < both else sides[:1])}
        imaged = sides if position < both or position >= d1 + d2 - m.scaled(729) else sides[:1]
        study = (
            f"{folder}/{patient}/07-18-{2010 + position % 2}-NA-NA-{10_000 + position}/1.000000-NA-{20_000 + position}"
        )
        for number, side in enumerate(sorted(2 * imaged), start=1):
            m.path(f"{study}/1-{number}.dcm").write_bytes(content(patient, side, 4 * position + number))
            if side in label_of:
                m.count(label_of[side].lower(), group=patient)
            else:
                m.count_out("unlabelled (its breast has no row in ")
        rows += [cmmd_row(m.random, patient, side, label) for side, label in label_of.items()]
    m.text(f"{folder}/LICENSE", ["CC BY 4.0"])
    m.left_out["unreadable DICOM header: InvalidDicomError"] += 1
    write_xlsx(m.root / "CMMD_clinicaldata_revision.xlsx", rows)


def cmmd_row(draw: random.Random, patient: str, side: str, label: str) -> list[object]:
    finding = draw.choice(("mass", "calcification", "both"))
    subtype = draw.choice(("Luminal A", "Luminal B", "HER2-enriched", "triple negative"))
    return [patient, side, draw.randrange(17, 88), 2, finding, label, subtype if patient.startswith("D2") else ""]


def dicom(m: Listing) -> Callable[[str, str, int], bytes]:
    """A writer of mammograms, by patient, side and number."""
    templates = {}
    for side in "LR":
        path = m.path(f"{side}.dcm")
        write_dicom(path, "D0-0000", side, seed=0)
        templates[side] = path.read_bytes()
        path.unlink()

    def write(patient: str, side: str, number: int) -> bytes:
        return templates[side].replace(b"D0-0000", patient.encode())[:-4] + number.to_bytes(4, "big")

    return write


def covid(m: Listing) -> None:
    """Names as in the collections that the images are from; those of the archive itself are not published."""
    names: dict[str, tuple[int, Callable[[int], str]]] = {
        "covid": (536, covid_name),
        "normal": (668, lambda n: f"{'NORMAL2-' if n % 2 else ''}IM-{n:04d}-0001.jpeg"),
        "virus": (619, lambda n: f"person{n}_virus_{2 * n + 4}.jpeg"),
    }
    for label, (count, name) in names.items():
        for number in range(m.scaled(count)):
            m.keep(f"COVID_IEEE/{label}/{name(number)}", label, mode="RGB" if number % 3 else "L")


def covid_name(number: int) -> str:
    suffix = ("jpg", "jpeg", "png", "jfif", "JPG", "PNG")[number % 6]
    return (f"1-s2.0-S{number:016d}-gr2_lrg-a.{suffix}", f"kjr-21-e24-g{number:03d}-l-a.{suffix}")[number // 6 % 2]


def chncxr(m: Listing) -> None:
    """326 without and 336 with tuberculosis, most with a palette; how many is not published (here two thirds)."""
    folder = "ChinaSet_AllFiles/ChinaSet_AllFiles"
    for label, first, count in (("normal", 1, 326), ("tuberculosis", 327, 336)):
        for number in range(first, first + m.scaled(count)):
            name = f"CHNCXR_{number:04d}_{int(label == 'tuberculosis')}"
            m.keep(f"{folder}/CXR_png/{name}.png", label, mode="P" if number % 3 else "RGB")
            m.text(f"{folder}/ClinicalReadings/{name}.txt", ["male 45yrs", label])
    m.text(f"{folder}/CXR_png/Thumbs.db", ["thumbs"])
    m.text(f"{folder}/NLM-ChinaCXRSet-ReadMe.docx", ["not read"])


LISTINGS: dict[str, Callable[[Listing], None]] = {
    writer.__name__: writer for writer in (ddr, messidor2, isic2018, isic2016, ddsm, cmmd, covid, chncxr)
}


def build(name: str, root: Path, share: float = 1.0, seed: int = 0) -> Listing:
    """Write a data set of a share of its size; each class of each split keeps at least a few images.

    Args:
        name: of the data set.
        root: folder to write it in.
        share: of the full size, above 0 and at most 1.
        seed: of labels, pairs and numbers.
    """
    listing = Listing(root, share, seed)
    LISTINGS[name](listing)
    return listing
