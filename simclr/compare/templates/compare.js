// Sorting and hiding; what is shown stands in the address, so that a view can be shared.
(() => {
  const table = document.querySelector("[data-sortable]");
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const state = new URLSearchParams(location.hash.slice(1));
  const valueOf = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
  };
  const order = (a, b) => {
    if (a === null || b === null) return 0;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  const remember = () => history.replaceState(null, "", "#" + state);
  const sort = (column, direction) => {
    const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
    // What has no value stands last, whichever way.
    rows.sort(([a], [b]) => (a === null) - (b === null) || direction * order(a, b));
    body.append(...rows.map(([, row]) => row));
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  };
  const show = (row, shown) => {
    row.classList.toggle("off", !shown);
    row.querySelector("input").checked = shown;
    document.querySelectorAll(`.chart [id*="-row-${row.dataset.row}-"]`).forEach((line) => {
      line.style.display = shown ? "" : "none";
    });
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "descending" ? 1 : head.hasAttribute("aria-sort") ? -1 : 1;
    sort(column, direction);
    state.set("sort", `${column},${direction}`);
    remember();
  }));
  const hidden = new Set((state.get("hide") ?? "").split(",").filter(Boolean));
  for (const row of body.rows) {
    show(row, !hidden.has(row.dataset.row));
    row.querySelector("input").addEventListener("change", (event) => {
      show(row, event.target.checked);
      event.target.checked ? hidden.delete(row.dataset.row) : hidden.add(row.dataset.row);
      state.set("hide", [...hidden].join(","));
      remember();
    });
  }
  const [column, direction] = (state.get("sort") ?? "").split(",").map(Number);
  if (column >= 0 && column < heads.length && direction) sort(column, direction);
})();
