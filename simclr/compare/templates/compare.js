// Sorting, hiding, zoom and axes; what is shown stands in the address, so that a view can be shared.
(() => {
  const table = document.querySelector("[data-sortable]");
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const state = new URLSearchParams(location.hash.slice(1));
  const content = (name) => { const found = document.getElementById(name); return found && JSON.parse(found.textContent); };
  let writing = null;
  const remember = (changes) => {
    for (const [name, value] of Object.entries(changes)) value === "" || value === null ? state.delete(name) : state.set(name, value);
    clearTimeout(writing);  // browsers allow so many changes a second
    writing = setTimeout(() => { try { history.replaceState(null, "", `#${state}`); } catch { /* then it is not shared */ } }, 150);
  };
  const valueOf = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.trim();
    return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
  };
  const order = (a, b) => {
    if (a === null || b === null) return 0;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  };
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
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "descending" ? 1 : head.hasAttribute("aria-sort") ? -1 : 1;
    sort(column, direction);
    remember({ sort: `${column},${direction}` });
  }));

  const wanted = Object.fromEntries(state);
  const curves = content("curves-data"), dots = content("scatter-data");
  const number = (value) => value === null ? "" : String(Number(value.toPrecision(6)));
  const plots = curves && charts(document.getElementById("curves"), curves, {
    smoothing: true,
    height: 270,
    change: ({ axis, from, to, smooth }) => remember({
      axis: axis === curves.axes[0] ? "" : axis, zoom: from === null ? "" : `${number(from)},${number(to)}`, smooth: smooth || "",
    }),
  });
  const points = dots && scatter(document.getElementById("scatter"), dots, (x, y) => remember({ x, y }));
  const hidden = new Set((wanted.hide ?? "").split(",").filter((row) => body.querySelector(`[data-row="${CSS.escape(row)}"]`)));
  const showRows = () => {
    for (const row of body.rows) {
      const off = hidden.has(row.dataset.row);
      row.classList.toggle("off", off);
      row.querySelector("input").checked = !off;
    }
    document.querySelectorAll("[data-of]").forEach((element) => { element.hidden = hidden.has(element.dataset.of); });
    plots?.hide(hidden);
    points?.hide(hidden);
  };
  const changed = () => { showRows(); remember({ hide: [...hidden].join(",") }); };
  for (const row of body.rows) row.querySelector("input").addEventListener("change", (event) => {
    event.target.checked ? hidden.delete(row.dataset.row) : hidden.add(row.dataset.row);
    changed();
  });
  document.getElementById("show-all").addEventListener("click", () => { hidden.clear(); changed(); });
  document.getElementById("show-none").addEventListener("click", () => { for (const row of body.rows) hidden.add(row.dataset.row); changed(); });

  const [column, direction] = (wanted.sort ?? "").split(",").map(Number);
  if (column >= 0 && column < heads.length && direction) sort(column, direction);
  if (plots) {
    if (wanted.axis) plots.setAxis(wanted.axis);
    if (wanted.smooth) plots.setSmooth(Number(wanted.smooth));
    const [from, to] = (wanted.zoom ?? "").split(",").map(Number);
    if (to > from) plots.zoom(from, to);
  }
  if (points && (wanted.x || wanted.y)) points.set(wanted.x, wanted.y);
  showRows();
})();
