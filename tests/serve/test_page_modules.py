"""The page's modules by themselves, in a real browser: Markdown, and conversations from files."""

import time

import pytest
from page_browser import Browser
from page_server import MARKDOWN

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    ("source", "markup"),
    [
        ("a *b **c** d* e", "<p>a <em>b <strong>c</strong> d</em> e</p>"),
        ("***x***", "<p><strong><em>x</em></strong></p>"),
        ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ("`` a`b ``", "<p><code>a`b</code></p>"),
        ("\\*no\\*", "<p>*no*</p>"),
        ("<b onclick=x>hi</b>", "<p>&lt;b onclick=x&gt;hi&lt;/b&gt;</p>"),
        ("~~old~~", "<p><del>old</del></p>"),
        ("- [x] done\n- open", '<ul><li class="task"><input type="checkbox" disabled="" checked="" '
         'aria-label="done">done</li><li>open</li></ul>'),
        ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
        ("[x](data:text/html,y) [y](/local)", "<p><span>x</span> <span>y</span></p>"),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("**open", "<p>**open</p>"),
    ],
)  # fmt: skip
def test_markdown_of_every_kind(tab, source, markup):
    assert render(tab, source) == markup


def render(tab: Browser, source: str) -> str:
    code = """
    const [source, done] = arguments;
    import("/page/markdown.js").then(({ renderMarkdown }) => {
      const box = document.createElement("div");
      renderMarkdown(box, source);
      done(box.getHTML());
    });
    """
    return tab.driver.execute_async_script(code, source)


def test_a_tree_that_a_file_holds_is_checked_before_it_is_kept(tab):
    code = """
    const done = arguments[0];
    import("/page/tree.js").then((tree_of) => {
      const { checkConversation, shownPath, addNode, stepBranch, newConversation } = tree_of;
      const user = (parent) => ({ role: "user", content: "x", parent });
      const stranger = { role: "root", parent: -1 };
      const wrong = [null, {}, ...[user(0), user(-2), stranger].map((node) => ({ nodes: [node] }))];
      for (const value of wrong) {
        let kept = true;
        try { checkConversation(value); } catch { kept = false; }
        if (kept) throw new Error(JSON.stringify(value));
      }
      const nodes = [user(-1), user(0), user(0)];
      const kept = checkConversation({ id: "../x", picked: 7, nodes });
      if (kept.id === "../x" || String(shownPath(kept)) !== "0,2") throw new Error("kept");
      const tree = newConversation();
      const first = addNode(tree, -1, { role: "user", content: "a" });
      addNode(tree, -1, { role: "user", content: "b" });
      const stepped = [stepBranch(tree, 1, 1), stepBranch(tree, 1, -1)];
      if (String(stepped) !== `1,${first}`) throw new Error(`branches ${stepped}`);
      return "checked";
    }).then(done, (error) => done(`${error}`));
    """
    assert tab.driver.execute_async_script(code) == "checked"


@pytest.mark.parametrize(
    "piece", ["*", "_a", "[", "[a](", "`", "> ", "- ", "~~", "**a ", "|a|b|\n", "1. ", "<"]
)
def test_hostile_markdown_is_drawn_in_time(tab, piece):
    begun = time.monotonic()
    assert render(tab, piece * 5000)
    assert time.monotonic() - begun < 2


def test_markdown_that_grows_ends_as_if_it_came_at_once(tab):
    code = """
    const [source, done] = arguments;
    import("/page/markdown.js").then(({ renderMarkdown }) => {
      const grown = document.createElement("div");
      const whole = document.createElement("div");
      for (let i = 0; i <= source.length; i += 3) renderMarkdown(grown, source.slice(0, i));
      renderMarkdown(grown, source);
      renderMarkdown(whole, source);
      done([grown.getHTML(), whole.getHTML()]);
    });
    """
    grown, whole = tab.driver.execute_async_script(code, MARKDOWN * 2)
    assert grown == whole
