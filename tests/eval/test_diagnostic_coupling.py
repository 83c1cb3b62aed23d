"""Support coupling: a dozen texts of each kind lie where they must, and the weights mean what they say."""

from __future__ import annotations

import pytest

from kvpress.errors import InputError
from kvpress_eval.diagnostic.coupling import Coupling, phi, task_coupling

LOW = 0.10

PROSE = [
    "The ferry left at nine. It carried forty passengers, three cars and a horse, and it was late, as it always was.",
    "She asked him whether he had seen the letter. He had not; nobody had. They searched the drawers until dusk.",
    "When the river rose in 1931, the town moved uphill.\nNobody planned it. One family went first,\nand then the baker, and within a year\nfor the whole street there was a new one.",
    '"I will not go," she said. "Then stay," said her brother, and he closed the door (which never quite closed).',
    "Chapter One\n\nIt had rained for a week. The fields were under water; the road had gone with the bridge.\n\nIn the morning the postman came by boat, and by noon the whole village knew what he had brought.",
    "The committee found three causes: poor maintenance, a shortage of staff, and the weather. It recommended nothing.\nThe minister thanked it.",
    "Bees see ultraviolet light. If a flower has a pattern that we cannot see, a bee can; this is why some white flowers\nare not white to them at all. Experiments with filters have shown it many times.",
    "Passage 1:\n"
    + "The old mill stands by the river and has not turned for sixty years, though its wheel is whole. " * 12
    + "\nPassage 2:\n"
    + "A museum was planned in it, and money collected, but the roof fell before the doors could open. " * 12,
    "Prices rose by 3.5 percent in May, 2.9 percent in June and 4.1 percent in July. Analysts had expected less.\n"
    "The bank is to meet on Thursday, and most expect it to wait.",
    "return to the house and wait for me there, he wrote,\nwhile the light is good and the road is dry,\nand from the window you will see the sails\nif the wind is from the west.",
    "河水在夜里涨了起来，天亮时桥已经不见了。村里的人站在岸边，谁也没有说话。后来邮差划着船来了，带来了城里的消息。",
    "To make the bread, mix flour and water and leave it overnight. In the morning add salt, fold it, and let it rise twice.\nBake it hot. It is done when it sounds hollow.",
]
CODE = [
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n",
    "import os\nfrom pathlib import Path\n\nclass Store:\n    def __init__(self, root: Path) -> None:\n        self.root = root\n\n    def names(self):\n        return sorted(os.listdir(self.root))\n",
    '#include <stdio.h>\n\nint main(void) {\n    int n = 3;\n    while (n > 0) {\n        printf("%d\\n", n);\n        n--;\n    }\n    return 0;\n}\n',
    "public class Point {\n    private final int x;\n    public Point(int x) {\n        this.x = x;\n    }\n    public int getX() {\n        return x;\n    }\n}\n",
    "const add = (a, b) => {\n  return a + b;\n};\n\nexport default add;\n",
    "func max(a int, b int) int {\n\tif a > b {\n\t\treturn a\n\t}\n\treturn b\n}\n",
    'fn main() {\n    let mut x = 5;\n    x += 1;\n    println!("{}", x);\n}\n',
    "try:\n    value = int(text)\nexcept ValueError:\n    value = None\nfinally:\n    log.close()\n",
    "SELECT name, age FROM people WHERE age > 30;\nUPDATE people SET age = 31 WHERE name = 'Ann';\nDELETE FROM people;\n",
    "@cache\ndef fib(n: int) -> int:\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
    "for (let i = 0; i < rows.length; i++) {\n  if (rows[i].id === id) {\n    return rows[i];\n  }\n}\n",
    "x = np.arange(10)\ny = x ** 2\nplt.plot(x, y)\nplt.show()\n",
]
RECORDS = [
    "id,name,city\n1,Ann,Oslo\n2,Bo,Rome\n3,Cy,Lima\n",
    "| model | budget | score |\n|---|---|---|\n| a | 5% | 41.2 |\n| b | 10% | 44.0 |\n",
    "2026-01-04 10:22:31 INFO started worker 3\n2026-01-04 10:22:33 WARN slow disk\n2026-01-04 10:22:40 INFO done\n",
    '{"id": 1, "name": "Ann"}\n{"id": 2, "name": "Bo"}\n{"id": 3, "name": "Cy"}\n',
    '{\n  "name": "Ann",\n  "age": 31,\n  "cities": [\n    "Oslo",\n    "Rome"\n  ]\n}\n',
    "Jan  4 10:22:31 host sshd[211]: accepted key\nJan  4 10:22:35 host sshd[211]: session opened\n",
    "<items>\n<item id='1'>Ann</item>\n<item id='2'>Bo</item>\n</items>\n",
    "name\tcity\tage\nAnn\tOslo\t31\nBo\tRome\t28\n",
    "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n",
    "step=1 loss=0.93 lr=0.001\nstep=2 loss=0.90 lr=0.001\nstep=3 loss=0.88 lr=0.001\n",
    "Ann    31    Oslo\nBo     28    Rome\nCy     45    Lima\n",
    "a;b;c\n1;2;3\n4;5;6\n",
]
LABELLED = [
    "Question: Who built the mill?\nType: Human\nQuestion: When did it close?\nType: Date\n",
    "Tom: are you coming?\nAnn: in ten minutes\nTom: bring the map\nAnn: ok\n",
    "[1] The mill was built in 1840.\n[2] It closed in 1961.\n[3] Its wheel is whole.\n",
    "name: mill\nbuilt: 1840\nclosed: 1961\nowner: the town\n",
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_low(text):
    assert phi(text) < LOW / 2


@pytest.mark.parametrize("text", CODE + RECORDS)
def test_code_and_records_are_high(text):
    assert phi(text) > 0.6


@pytest.mark.parametrize("text", LABELLED)
def test_labels_are_high_but_weigh_half(text):
    assert 0.4 <= phi(text) <= 0.5


def test_a_line_counts_by_its_length_and_its_kind():
    prose, code = "abcde fghij", "x = f(1234)"  # 10 characters and 9 that are not white space
    assert phi(f"{prose}\n\n{code}\n") == pytest.approx(9 / 19)
    assert phi(f"{prose}\n{code}", Coupling(code=0.25)) == pytest.approx(0.25 * 9 / 19)


def test_a_label_reaches_no_further_than_its_line_of_a_page():
    text = "Note: " + "word " * 100  # 405 characters, of which 80 count by half
    assert phi(text) == pytest.approx(0.5 * 80 / 405)
    assert phi(text, Coupling(label_reach=10)) == pytest.approx(0.5 * 10 / 405)


def test_a_row_needs_a_neighbour_with_as_many_fields():
    assert phi("1,2,3\n4,5,6") == 1
    assert phi("1,2,3\nalone among the words\n4,5,6") == 0
    assert phi("1,2\n3,4") == 0
    assert phi("1,2\n3,4", Coupling(min_fields=2)) == 1


def test_wrapping_does_not_matter_to_prose_beside_code():
    words, code = "the quick brown fox jumps over the lazy dog and then does it again without end", "\nreturn x;\n"
    assert phi(words + code) == pytest.approx(phi(words.replace(" ", "\n") + code))
    assert 0.1 < phi(words + code) < 0.2


@pytest.mark.parametrize("text", ["{" + ":" * 300_000, "a" * 300_000, "a=b " * 75_000, "<" * 300_000, " ," * 99_999])
def test_a_very_long_line_is_no_trap(text):
    assert 0 <= phi(text) <= 1  # hours, if a pattern backtracked over all of it


def test_a_task_is_the_median_of_its_contexts():
    assert task_coupling([PROSE[0], CODE[0], CODE[0]]) == phi(CODE[0])
    assert task_coupling(["", "x = 1"]) == pytest.approx(0.5)
    assert phi("") == phi(" \n\n") == 0
    with pytest.raises(InputError, match="there are none"):
        task_coupling([])
