"use strict";
// Sorts the rows by a column, and shows those that fit the filter and the words.
(() => {
  const body = document.querySelector(".rows tbody");
  const rows = [...body.rows];
  const tools = document.querySelector(".tools");
  const filter = tools.querySelector("select");
  const words = tools.querySelector("input");
  const count = tools.querySelector(".count");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits =
        (!filter.value || row.dataset.kinds.split(" ").includes(filter.value)) &&
        wanted.every((word) => texts.get(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} prompts`;
  }

  function sort(head) {
    const column = head.cellIndex;
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
    const order = new Intl.Collator(undefined, { numeric: true });
    const sorted = [...rows].sort((a, b) => order.compare(key(a), key(b)));
    body.append(...(descending ? sorted.reverse() : sorted));
  }

  for (const button of document.querySelectorAll(".rows thead button")) {
    button.addEventListener("click", () => sort(button.parentNode));
  }
  body.addEventListener("click", (event) => {
    const link = event.target.closest("tr")?.querySelector("a");
    if (link && !event.target.closest("a") && !String(window.getSelection())) link.click();
  });
  filter.addEventListener("change", show);
  words.addEventListener("input", show);
  tools.hidden = false;
  show();
})();
