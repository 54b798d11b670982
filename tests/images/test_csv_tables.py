"""Tables of images: how each is read, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from support.image_files import fill, image_bytes, table

from featstore.images.digests import (
    DigestTable,
    KnownDigests,
)
from featstore.images.image_set import ImageSet
from featstore.images.sources import FolderSource


class TestTables:
    def test_a_table_gives_labels_splits_and_groups_in_its_order(self, tmp_path: Path) -> None:
        file = table(
            tmp_path / "plants.csv",
            "\ufeffpath, label ,split,group",
            "b/2.png,rose,train,p1",
            "",
            '"a, b/1.png", tulip ,val,p2',
            "a/3.png,,TEST,p3",
            "a/../c/4.png,tulip,,p1",
        )
        images = ImageSet.from_csv(file, split_column="split", group_column="group")
        assert images.name == "plants"
        assert images.ids == ("b/2.png", "a, b/1.png", "a/3.png", "c/4.png")
        assert images.classes == ("rose", "tulip")
        np.testing.assert_array_equal(images.targets, [0, 1, -1, 1])
        assert images.splits.tolist() == ["train", "valid", "test", ""]
        assert images.groups == ("p1", "p2", "p3", "p1")
        assert images.source == FolderSource(root=str(tmp_path))

    def test_a_column_split_is_used_as_path_and_label_are(self, tmp_path: Path) -> None:
        file = table(
            tmp_path / "t.csv", "path,label,split", "1.png,a,train", "2.png,a,Val", "3.png,b,", "4.png,b,train"
        )
        images = ImageSet.from_csv(file)
        assert images.splits.tolist() == ["train", "valid", "", "train"]
        np.testing.assert_array_equal(ImageSet.from_csv(file, split_column="split").splits, images.splits)
        assert ImageSet.from_csv(file, split_column="").splits.tolist() == [""] * 4
        assert ImageSet.from_csv(file, split_column="").split(0.5).splits.tolist().count("valid") == 2
        assert ImageSet.from_csv(file, label_column="split").classes == ("Val", "train")
        assert ImageSet.from_csv(file, label_column="split").splits.tolist() == [""] * 4

    def test_a_column_split_of_other_words_is_never_passed_over(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,label,split,part", "1.png,a,fold1,train", "2.png,a,fold2,valid")
        with pytest.raises(
            ValueError,
            match=r"line 2 of .* has the split 'fold1'\. Expected train, .* --split-column NAME \(in Python: "
            r"split_column=NAME\), or use none, to split anew: --split-column '' \(split_column=\"\"\)\.$",
        ):
            ImageSet.from_csv(file)
        assert ImageSet.from_csv(file, split_column="part").splits.tolist() == ["train", "valid"]
        assert ImageSet.from_csv(file, split_column="").splits.tolist() == ["", ""]

    @pytest.mark.parametrize("column", ["Split", "SPLIT", "subset", "Partition"])
    def test_a_column_of_splits_is_used_however_it_is_called(self, tmp_path: Path, column: str) -> None:
        file = table(
            tmp_path / "t.csv", f"path,label,{column}", "1.png,a,train", "2.png,a,Test", "3.png,b,val", "4.png,b,train"
        )
        images = ImageSet.from_csv(file)
        assert images.splits.tolist() == ["train", "test", "valid", "train"]
        assert images.origin["split_column"] == column
        assert ImageSet.from_csv(file, split_column="").splits.tolist() == [""] * 4
        assert ImageSet.from_csv(file, label_column=column, held_out_classes=True).splits.tolist() == [""] * 4

    def test_a_column_that_only_sounds_like_splits_is_left(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,label,subset,fold", "1.png,a,north,train", "2.png,a,train,test")
        assert ImageSet.from_csv(file).splits.tolist() == ["", ""]

    def test_two_columns_that_may_be_the_splits_are_refused(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,label,Split,SPLIT", "1.png,a,train,test", "2.png,a,test,train")
        with pytest.raises(ValueError, match=r"has the columns Split and SPLIT\. .* --split-column NAME"):
            ImageSet.from_csv(file)
        assert ImageSet.from_csv(file, split_column="SPLIT").splits.tolist() == ["test", "train"]

    @pytest.mark.parametrize("column", ["split", "Split"])
    def test_a_split_of_0_and_1_is_answered_with_the_flag_for_it(self, tmp_path: Path, column: str) -> None:
        file = table(tmp_path / "t.csv", f"path,label,{column}", "1.png,a,0", "2.png,a,1")
        with pytest.raises(ValueError, match=rf"if 1 says what is held out: --valid-column {column} \(valid_column="):
            ImageSet.from_csv(file)
        assert ImageSet.from_csv(file, valid_column=column).splits.tolist() == ["train", "valid"]

    def test_tabs_and_a_root_of_its_own(self, tmp_path: Path) -> None:
        fill(tmp_path / "photos", "1.png")
        file = table(tmp_path / "t.tsv", "file\tkind", "1.png\tcat")
        images = ImageSet.from_csv(file, root=tmp_path / "photos", path_column="file", label_column="kind")
        assert images.read(0) == image_bytes(0)
        with pytest.raises(ValueError, match=r"no table by its suffix"):
            ImageSet.from_csv(table(tmp_path / "t.txt", "path,label"))

    def test_a_label_and_a_group_in_two_unicode_spellings_are_one(self, tmp_path: Path) -> None:
        lines = [
            "path,label,Gro\u0308\u00dfe",
            "1.png,caf\u00e9,Ma\u0308x",
            "2.png,cafe\u0301,M\u00e4x",
            "3.png,bar,Zo\u0308e",
        ]
        images = ImageSet.from_csv(table(tmp_path / "t.csv", *lines), group_column="Gr\u00f6\u00dfe")
        assert images.classes == ("bar", "caf\u00e9")
        np.testing.assert_array_equal(images.targets, [1, 1, 0])
        assert images.groups == ("M\u00e4x", "M\u00e4x", "Zo\u0308e")  # a single spelling deals as it did
        assert [note.split(" comes in 2 ")[0] for note in images.notes] == [
            "the label 'caf\u00e9'",
            "the group 'M\u00e4x'",
        ]

    def test_a_file_is_found_in_the_unicode_spelling_that_it_has(self, tmp_path: Path) -> None:
        fill(tmp_path, "Ba\u0308ren/caf\u00e9.png", "abs/u\u0308.png")
        absolute = str(tmp_path / "abs" / "\u00fc.png")
        file = table(
            tmp_path / "t.csv", "path,label", "B\u00e4ren/cafe\u0301.png,a", f"{absolute},b", "no/\u00fc.png,b"
        )
        images = ImageSet.from_csv(file)
        assert images.read(0) == image_bytes(0)
        assert images.absent() == [2]
        found = images.digests()
        assert list(found.failed) == [2]
        assert bytes(found.values[1]) == hashlib.sha256(image_bytes(1)).digest()
        assert not images.digests(KnownDigests([DigestTable.of(images.ids, found)])).failed.keys() - {2}

    def test_a_path_in_two_unicode_spellings_is_one_image_twice(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,label", "caf\u00e9.png,a", "cafe\u0301.png,b")
        with pytest.raises(ValueError, match=r"names cafe\u0301.png twice, in line 2 and in line 3"):
            ImageSet.from_csv(file)

    def test_several_labels_become_n_hot_columns(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path,label", "1.png,dog; cat", "2.png,", "3.png,cat;cat", "4.png,ant")
        images = ImageSet.from_csv(file, task="multi", label_sep=";")
        assert images.classes == ("ant", "cat", "dog")
        assert images.targets is not None
        assert images.targets.dtype == np.float32
        np.testing.assert_array_equal(images.targets, [[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]])
        assert images.describe() == "4 images, 3 classes (ant 1, cat 2, dog 1), several an image"

    @pytest.mark.parametrize(
        ("cell", "separator", "plain"),
        [
            ("['cat', 'indoor']", ",", "'cat,indoor'"),
            ('["cat", "indoor"]', ";", "'cat;indoor'"),
            ("[cat, indoor]", ",", "'cat,indoor'"),
            ("('cat', 'indoor')", None, "'cat;indoor'"),
        ],
    )
    def test_a_list_with_brackets_is_refused_with_the_form_that_is_expected(
        self, tmp_path: Path, cell: str, separator: str | None, plain: str
    ) -> None:
        file = table(
            tmp_path / "m.tsv", "path\tlabel", f"1.png\t{cell}" if '"' not in cell else '1.png\t"[""cat"", ""indoor""]"'
        )
        with pytest.raises(
            ValueError, match=rf"line 2 of .* a list with brackets. Expected the names alone, such as {plain}"
        ):
            ImageSet.from_csv(file, task="single" if separator is None else "multi", label_sep=separator)

    def test_a_class_name_with_brackets_is_a_name(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path,label", "1.png,[unknown]", "2.png,(none)")
        assert ImageSet.from_csv(file).classes == ("(none)", "[unknown]")

    @pytest.mark.parametrize(
        ("text", "encoding", "words"),
        [
            ("path;label\na,b.png;cat\n", "utf-8", "cells separated by ';'"),
            ("sep=;\npath;label\na,b.png;cat\n", "utf-8-sig", "cells separated by ';'"),
            ("path\tlabel\na,b.png\tcat\n", "utf-16", r"cells separated by '\t' and UTF-16"),
            ('path,label\n"a,b.png",cat\n', "utf-16-le", "UTF-16"),
            ('\npath,label\n"a,b.png",cat\n', "utf-16-be", "UTF-16"),
            ("label|x;y|path\ncat|0|a,b.png\n", "utf-8", "cells separated by '|'"),
        ],
    )
    def test_a_dialect_is_found_by_the_header_and_said(
        self, tmp_path: Path, text: str, encoding: str, words: str
    ) -> None:
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        images = ImageSet.from_csv(tmp_path / "t.csv")
        assert (images.ids, images.classes) == (("a,b.png",), ("cat",))
        assert images.notes[0] == f"t.csv is read as {words}"

    def test_a_line_after_the_separators_own_is_named_by_its_number(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "sep=;", "path;label", "1.png;a", "2.png")
        with pytest.raises(ValueError, match=r"line 4 of .* has 1 cell"):
            ImageSet.from_csv(file)

    def test_lines_that_are_not_utf8_are_said(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes(b"path,label\n1.png,caf\xc3\xa9\n2.png,caf\xe9\n")
        (note, *_) = ImageSet.from_csv(tmp_path / "t.csv").notes
        assert note.startswith("1 line of t.csv (the first is 3) is not UTF-8")
        assert note.endswith("iconv -f latin1 -t utf-8 t.csv > utf8.csv")
        (tmp_path / "t.csv").write_bytes(b"path,label\n1.png,caf\xc3\xa9\n2.png,bar\n")
        assert ImageSet.from_csv(tmp_path / "t.csv").notes == ()

    def test_backslashes_are_slashes(self, tmp_path: Path) -> None:
        fill(tmp_path, "a/b/1.png", "a/2.png")
        images = ImageSet.from_csv(table(tmp_path / "t.csv", "path,label", "a\\b\\1.png,x", "a/2.png,y"))
        assert images.ids == ("a/b/1.png", "a/2.png")
        assert images.notes == ("backslashes in 1 path are read as slashes",)
        assert images.read(0) == image_bytes(0)

    def test_names_without_suffix_get_it(self, tmp_path: Path) -> None:
        fill(tmp_path, "1.png", "2.png", "3.5.png")
        file = table(tmp_path / "t.csv", "path,label", "1,x", "2.PNG,y", "3.5,y")
        assert ImageSet.from_csv(file, suffix=".png").ids == ("1.png", "2.PNG", "3.5.png")
        assert ImageSet.from_csv(file).notes == (
            "the files end with .png, which the table leaves out: say --suffix .png",
        )

    def test_one_hot_columns_are_classes_in_their_order(self, tmp_path: Path) -> None:
        file = table(
            tmp_path / "t.csv", "path,zebra,ant,owl", "1.png,1,0,0", "2.png,0.0,1.0,0.0", "3.png,0,0,", "4.png,0,0,0"
        )
        images = ImageSet.from_csv(file, one_hot="*")
        assert images.classes == ("zebra", "ant", "owl")
        np.testing.assert_array_equal(images.targets, [0, 1, -1, -1])
        several = ImageSet.from_csv(
            table(tmp_path / "m.csv", "path,a,b", "1.png,1,1"), one_hot=["b", "a"], task="multi"
        )
        assert several.classes == ("b", "a")
        np.testing.assert_array_equal(several.targets, [[1, 1]])

    @pytest.mark.parametrize(
        ("row", "one_hot", "message"),
        [
            ("1.png,1,1", "*", "line 2 of .* has 2 classes: a, b. Expected one, .*--task multi"),
            ("1.png,1,-1", "*", "line 2 of .* has '-1' in the column b. Expected 0 or 1"),
            ("1.png,1,0", ["c"], "has no column 'c'; it has 'path', 'a', 'b'. Expected a column of 0 and 1"),
            ("1.png,1,0", [], r"one_hot\) names no column, so there is no class; the table has a, b besides"),
        ],
    )
    def test_one_hot_columns_of_anything_else_are_refused(
        self, tmp_path: Path, row: str, one_hot: list[str] | Literal["*"], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            ImageSet.from_csv(table(tmp_path / "t.csv", "path,a,b", row), one_hot=one_hot)

    def test_a_column_of_what_is_held_out_is_a_split(self, tmp_path: Path) -> None:
        rows = ["1.png,a,False", "2.png,a,True", "3.png,b,0"]
        file = table(tmp_path / "t.csv", "path,label,is_valid", *rows)
        assert ImageSet.from_csv(file, valid_column="is_valid").splits.tolist() == ["train", "valid", "train"]
        assert ImageSet.from_csv(file).notes == (
            "the table's column is_valid isn't used; if it says what is held out: --valid-column is_valid",
        )
        with pytest.raises(ValueError, match="Expected one column that says the split"):
            ImageSet.from_csv(file, valid_column="is_valid", split_column="label")
        with pytest.raises(ValueError, match=r"line 2 of .* has '1.png' in the column of what is held out"):
            ImageSet.from_csv(file, valid_column="path")

    def test_a_missing_column_is_answered_with_what_may_be_meant(self, tmp_path: Path) -> None:
        fill(tmp_path / "dogs", "0a1.jpg")
        file = table(tmp_path / "t.csv", "id,breed", "0a1,boxer", "0a2,pug")
        with pytest.raises(
            ValueError,
            match=r"no column 'path'; it has 'id', 'breed'\. Expected one column with each image's path, maybe "
            r"--path-column id --suffix \.jpg --label-column breed "
            r"\(in Python: path_column='id', suffix='\.jpg', label_column='breed'\)",
        ):
            ImageSet.from_csv(file, root=tmp_path / "dogs")
        images = ImageSet.from_csv(file, root=tmp_path / "dogs", path_column="id", suffix=".jpg", label_column="breed")
        assert images.read(0) == image_bytes(0)
        other = table(tmp_path / "u.csv", "num,photo,kind of", "1,x.png,a")
        with pytest.raises(ValueError, match="path, maybe --path-column photo \\(in"):
            ImageSet.from_csv(other)

    def test_columns_of_0_and_1_without_labels_are_answered_with_one_hot(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "path,cat,dog,Split", "1.png,1,0,train", "2.png,0,1,test")
        with pytest.raises(ValueError, match=r"maybe --one-hot '\*' \(in Python: one_hot='\*'\)"):
            ImageSet.from_csv(file)
        images = ImageSet.from_csv(file, one_hot="*")
        assert (images.classes, images.splits.tolist()) == (("cat", "dog"), ["train", "test"])

    def test_a_table_without_a_header_is_told_to_get_one(self, tmp_path: Path) -> None:
        file = table(tmp_path / "t.csv", "cat/0.png,cat", "dog/1.png,dog")
        with pytest.raises(ValueError, match=r"has no header: .* an image, cat/0\.png\. .* such as path,label at the"):
            ImageSet.from_csv(file)

    def test_the_start_of_paths_of_another_machine_is_cut_off(self, tmp_path: Path) -> None:
        fill(tmp_path, "cats/1.png", "cats/2.png")
        for start in ("/data/photos", "C:\\photos", "old"):
            join = "\\" if "\\" in start else "/"
            lines = [join.join([start, "cats", f"{number}.png"]) + ",a" for number in (1, 2)]
            file = table(tmp_path / "t.csv", "path,label", *lines)
            images = ImageSet.from_csv(file, root=tmp_path, strip=start)
            assert images.ids == ("cats/1.png", "cats/2.png")
            assert images.absent() == []
            assert ImageSet.from_csv(file, root=tmp_path).absent() == [0, 1]
        with pytest.raises(ValueError, match=r"no path of .* begins with /elsewhere \(the first is old/cats/1.png\)"):
            ImageSet.from_csv(file, root=tmp_path, strip="/elsewhere")

    def test_several_labels_are_never_inferred(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path,label", "1.png,dog;cat", "2.png,dog")
        assert ImageSet.from_csv(file).classes == ("dog", "dog;cat")
        with pytest.raises(ValueError, match=r"label_sep is ';' but task is 'single'"):
            ImageSet.from_csv(file, label_sep=";")

    def test_no_label_column_is_an_unlabelled_set(self, tmp_path: Path) -> None:
        file = table(tmp_path / "m.csv", "path", "1.png", "2.png")
        for images in (
            ImageSet.from_csv(file, label_column=None),
            ImageSet.from_csv(file, label_column=None, task="multi"),
        ):
            assert images.targets is None

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (
                ["name,label", "1.png,a"],
                r"no column 'path'; it has 'name', 'label'.*--path-column NAME \(in Python: path_column=NAME\)\.$",
            ),
            (["path,kind", "1.png,a"], r"no column 'label'.*say --label-column '' \(label_column=None\)\.$"),
            (["path,label,label", "1.png,a,b"], r"2 columns 'label'"),
            (["path,label", "1.png,a", "x/../1.png,b"], r"names 1.png twice, in line 2 and in line 3"),
            (["path,label", "1.png,a", "2.png,a,b"], r"line 3 of .* has 3 cells. Expected 2"),
            (["path,label", '"1', '2.png",a', ",b"], r"line 4 of .* names no image"),
            (["path,label", '1.png,"a"b'], r"understood at line 2"),
            (["path,label"], r"only a header"),
            ([], r"holds nothing"),
        ],
    )
    def test_a_table_that_cant_be_understood_is_named_with_the_line(
        self, tmp_path: Path, lines: list[str], message: str
    ) -> None:
        file = tmp_path / "t.csv"
        file.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            ImageSet.from_csv(file)

    @pytest.mark.parametrize(
        ("cells", "message"),
        [
            ("2.png,a,hold-out,p", r"line 3 of .* has the split 'hold-out'. Expected train, valid"),
            (
                "2.png,fox,valid,p",
                r"class 'fox' \(line 3 of .*, split valid\) is not in train.*; to extract .*--label-column ''",
            ),
            ("2.png,a,valid,", r"line 3 of .* has no group"),
        ],
    )
    def test_a_wrong_split_class_or_group_is_named_with_the_line(
        self, tmp_path: Path, cells: str, message: str
    ) -> None:
        file = table(tmp_path / "t.csv", "path,label,split,group", "1.png,a,train,p", cells)
        with pytest.raises(ValueError, match=message):
            ImageSet.from_csv(file, split_column="split", group_column="group")

    def test_paths_outside_the_root_are_kept_as_they_are_meant(self, tmp_path: Path) -> None:
        fill(tmp_path, "labels/in.png", "photos/out.png", "far/abs.png")
        lines = ["path", str(tmp_path / "labels" / "in.png"), "../photos/out.png", str(tmp_path / "far" / "abs.png")]
        images = ImageSet.from_csv(table(tmp_path / "labels" / "t.csv", *lines), label_column=None)
        assert images.ids == ("in.png", "../photos/out.png", (tmp_path / "far" / "abs.png").as_posix())
        assert [images.read(i) for i in range(3)] == [image_bytes(0), image_bytes(1), image_bytes(2)]
        again = table(tmp_path / "labels" / "u.csv", *lines, str(tmp_path / "photos" / "out.png"))
        with pytest.raises(ValueError, match="twice"):
            ImageSet.from_csv(again, label_column=None)
