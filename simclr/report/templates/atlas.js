// The atlas: images where their features put them. Pan, zoom, look, filter, choose with a lasso or the keyboard.
(() => {
  const root = document.getElementById("atlas");
  if (!root) return;
  const data = JSON.parse(document.getElementById("atlas-data").textContent);
  const { count, side, cell, columns, classes, names } = data;
  const places = unpack(data.places, Uint16Array), near = unpack(data.near, Uint16Array), nearEach = near.length / count;
  const labels = data.labels && unpack(data.labels, Uint16Array), said = data.said && unpack(data.said, Uint16Array);
  const find = (selector) => root.querySelector(selector);
  const canvas = find("canvas.map"), card = find(".card"), list = find("textarea"), spoken = find(".spoken");
  const sprite = find("img.sprite"), pen = canvas.getContext("2d");
  const lassoButton = find("[data-do=lasso]"), points = find("[name=points]"), mistakes = find("[name=mistakes]");
  const colourBy = find("[name=colour]"), chosenText = find(".chosen-count"), shownText = find(".shown-count");
  const view = { scale: 1, x: 0, y: 0 };  // zoom, and what lies at the middle of the canvas
  const only = new Set();  // classes; none: all
  const chosen = new Set();
  let current = null, lasso = null, grabbed = null, due = false, colours = {}, lassoing = false, space = {}, order = [];

  const isWrong = (i) => said !== null && said !== undefined && said[i] !== labels[i];
  const isShown = (i) => (!only.size || only.has(labels[i])) && (!mistakes?.checked || isWrong(i));
  const pathOf = (i) => data.root ? `${data.root}/${names[i]}` : names[i];
  const className = (i) => labels && classes ? classes[labels[i]] : "";
  const measure = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight, pad = 26;
    const h = height - 2 * pad, w = Math.min(width - 2 * pad, 1.7 * h);  // a wide map is stretched, within reason
    space = { width, height, w, h: Math.min(h, 1.35 * w) };
  };
  const toX = (i) => space.width / 2 + (places[2 * i] / 65535 - 0.5 - view.x) * space.w * view.scale;
  const toY = (i) => space.height / 2 + (places[2 * i + 1] / 65535 - 0.5 - view.y) * space.h * view.scale;
  const tileSide = () => {
    const base = Math.max(10, Math.min(34, 0.74 * Math.sqrt(space.w * space.h / count)));
    return Math.min(Math.max(96, side), base * view.scale ** 0.8);
  };
  const colourFor = (i) => {
    if (colourBy?.value === "right") return isWrong(i) ? colours.wrong : colours.accent;
    return labels && data.colours ? data.colours[labels[i]] : colours.accent;
  };
  const source = (i) => [i % columns * cell, Math.floor(i / columns) * cell, side, side];

  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    measure();
    if (!space.width) return;
    if (canvas.width !== Math.round(space.width * ratio)) canvas.width = Math.round(space.width * ratio);
    if (canvas.height !== Math.round(space.height * ratio)) canvas.height = Math.round(space.height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, space.width, space.height);
    const tile = tileSide(), half = tile / 2, frame = tile > 22 ? 2 : 1.5, ready = sprite.complete && sprite.naturalWidth;
    pen.imageSmoothingEnabled = tile < side || side > 64;
    const asPoints = points.checked || !ready;
    order = [];
    pen.fillStyle = colours.yardstick;
    pen.globalAlpha = 0.35;
    const inside = (x, y) => x > -half && y > -half && x < space.width + half && y < space.height + half;
    for (let i = 0; i < count; i++) {
      const x = toX(i), y = toY(i);
      if (!inside(x, y)) continue;
      if (isShown(i)) order.push(i); else pen.fillRect(x - 1.5, y - 1.5, 3, 3);
    }
    pen.globalAlpha = 1;
    const put = (i) => {
      const x = toX(i), y = toY(i), strong = i === current, size = strong ? half * 1.5 : half;
      if (asPoints) {
        pen.fillStyle = colourFor(i);
        pen.globalAlpha = 0.8;
        pen.beginPath(); pen.arc(x, y, Math.min(9, tile / 5 + 1) * (strong ? 1.6 : 1), 0, 7); pen.fill();
        pen.globalAlpha = 1;
        if (chosen.has(i) || strong) { pen.strokeStyle = colours.ink; pen.lineWidth = 2; pen.stroke(); }
        return;
      }
      if (chosen.has(i) || strong) {
        const ring = frame + 2.5;
        pen.fillStyle = colours.ink;
        pen.fillRect(x - size - ring, y - size - ring, 2 * (size + ring), 2 * (size + ring));
      }
      pen.fillStyle = colourFor(i);
      pen.fillRect(x - size - frame, y - size - frame, 2 * (size + frame), 2 * (size + frame));
      pen.drawImage(sprite, ...source(i), x - size, y - size, 2 * size, 2 * size);
    };
    for (const i of order) if (!chosen.has(i)) put(i);
    for (const i of order) if (chosen.has(i)) put(i);
    if (current !== null) {
      for (let k = 0; k < nearEach; k++) {
        const other = near[current * nearEach + k];
        pen.strokeStyle = colours.ink;
        pen.globalAlpha = 0.5;
        pen.lineWidth = 1;
        pen.beginPath(); pen.moveTo(toX(current), toY(current)); pen.lineTo(toX(other), toY(other)); pen.stroke();
        pen.globalAlpha = 1;
      }
      put(current);
    }
    if (lasso) {
      pen.strokeStyle = colours.accent;
      pen.lineWidth = 2;
      pen.setLineDash([6, 4]);
      pen.beginPath(); lasso.forEach(([x, y]) => pen.lineTo(x, y)); pen.closePath(); pen.stroke();
      pen.setLineDash([]);
      pen.fillStyle = colours.accent;
      pen.globalAlpha = 0.1;
      pen.fill();
      pen.globalAlpha = 1;
    }
    canvas.style.touchAction = lassoing || view.scale > 1.05 ? "none" : "pan-y";  // of a whole map the page scrolls
    root.drawn = (root.drawn ?? 0) + 1;
  };
  const redraw = () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; draw(); });
  };
  const paint = () => {
    colours = Object.fromEntries(["ink", "paper", "accent", "wrong", "yardstick"].map((name) => [name, colourOf(name)]));
    redraw();
  };

  const thumbnail = (i, size) => {
    const small = make("canvas", { width: size, height: size });
    const brush = small.getContext("2d");
    brush.imageSmoothingEnabled = side > 64 || size < side;
    if (sprite.complete && sprite.naturalWidth) brush.drawImage(sprite, ...source(i), 0, 0, size, size);
    return small;
  };
  const show = (i) => {
    if (i === current) return;
    current = i;
    card.hidden = i === null;
    redraw();
    if (i === null) return;
    const scale = Math.max(1, Math.floor(192 / side)), big = side * scale;
    const words = make("div", { class: "words" });
    if (className(i)) words.append(make("b", { text: className(i) }));
    if (isWrong(i)) words.append(make("span", { class: "mistake", text: `taken for ${classes[said[i]]}` }));
    words.append(make("span", { class: "path", text: names[i] }));
    const others = make("div", { class: "nearest" });
    for (let k = 0; k < nearEach; k++) {
      const other = near[i * nearEach + k], small = thumbnail(other, 40);
      if (labels && labels[other] !== labels[i]) small.className = "other";
      others.append(small);
    }
    card.replaceChildren(thumbnail(i, big), words, make("span", { class: "small", text: "nearest in features" }), others);
    const x = toX(i), y = toY(i), reach = tileSide() / 2 * 1.5 + 14, wide = card.offsetWidth, tall = card.offsetHeight;
    const left = x + reach + wide < space.width ? x + reach : x - reach - wide;
    card.style.left = `${Math.max(0, Math.min(space.width - wide, left))}px`;
    card.style.top = `${Math.max(0, Math.min(space.height - tall, y - tall / 2))}px`;
  };
  const speak = (i) => {
    spoken.textContent = [className(i), isWrong(i) ? `taken for ${classes[said[i]]}` : "", names[i], chosen.has(i) ? "chosen" : ""].filter(Boolean).join(", ");
  };
  const at = (x, y) => {  // the image that lies on top there
    const reach = Math.max(7, points.checked ? 8 : tileSide() / 2 + 2);
    if (current !== null && Math.max(Math.abs(toX(current) - x), Math.abs(toY(current) - y)) < reach) return current;
    for (let k = order.length - 1; k >= 0; k--) {
      const i = order[k];
      if (Math.abs(toX(i) - x) < reach && Math.abs(toY(i) - y) < reach) return i;
    }
    return null;
  };

  const listChosen = () => {
    const found = [...chosen].sort((a, b) => a - b);
    chosenText.textContent = found.length ? `${found.length.toLocaleString("en")} chosen` : "Nothing chosen";
    list.value = found.map(pathOf).join("\n");
    root.querySelectorAll(".with-chosen").forEach((element) => { element.disabled = !found.length; });
    list.hidden = !found.length;
    redraw();
  };
  const isInside = (x, y, polygon) => {
    let inside = false;
    for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
      const [ax, ay] = polygon[i], [bx, by] = polygon[j];
      if (ay > y !== by > y && x < (bx - ax) * (y - ay) / (by - ay) + ax) inside = !inside;
    }
    return inside;
  };
  const toggle = (i) => { chosen.has(i) ? chosen.delete(i) : chosen.add(i); listChosen(); };

  const zoomAt = (factor, x, y) => {
    const scale = Math.max(0.8, Math.min(60, view.scale * factor)), real = scale / view.scale;
    view.x += (x - space.width / 2) / (space.w * view.scale) * (1 - 1 / real);
    view.y += (y - space.height / 2) / (space.h * view.scale) * (1 - 1 / real);
    view.scale = scale;
    keep();
  };
  const pan = (dx, dy) => { view.x -= dx / (space.w * view.scale); view.y -= dy / (space.h * view.scale); keep(); };
  const keep = () => {
    view.x = Math.max(-0.6, Math.min(0.6, view.x));
    view.y = Math.max(-0.6, Math.min(0.6, view.y));
    redraw();
  };
  const showAll = () => { Object.assign(view, { scale: 1, x: 0, y: 0 }); redraw(); };
  const setLasso = (on) => {
    lassoing = on;
    lassoButton.setAttribute("aria-pressed", on);
    canvas.classList.toggle("lassoing", on);
    redraw();
  };

  const fingers = new Map();
  const spot = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, spot(event));
    if (fingers.size > 1) { lasso = null; grabbed = null; return; }
    if (lassoing || event.shiftKey) lasso = [spot(event)];
    else grabbed = { from: spot(event), last: spot(event), moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = spot(event);
    if (fingers.size === 2 && fingers.has(event.pointerId)) {
      const [a, b] = [...fingers.values()], gap = Math.hypot(a[0] - b[0], a[1] - b[1]), middle = [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
      fingers.set(event.pointerId, [x, y]);
      const [c, d] = [...fingers.values()], wider = Math.hypot(c[0] - d[0], c[1] - d[1]);
      pan((c[0] + d[0]) / 2 - middle[0], (c[1] + d[1]) / 2 - middle[1]);
      zoomAt(wider / (gap || 1), (c[0] + d[0]) / 2, (c[1] + d[1]) / 2);
      show(null);
    } else if (lasso) {
      lasso.push([x, y]);
      show(null);
      redraw();
    } else if (grabbed) {
      grabbed.moved ||= Math.hypot(x - grabbed.from[0], y - grabbed.from[1]) > 5;
      if (grabbed.moved) { show(null); canvas.classList.add("grabbed"); pan(x - grabbed.last[0], y - grabbed.last[1]); }
      grabbed.last = [x, y];
    } else show(at(x, y));
  });
  const release = (event) => {
    const [x, y] = spot(event);
    fingers.delete(event.pointerId);
    canvas.classList.remove("grabbed");
    if (lasso) {
      const polygon = lasso;
      lasso = null;
      if (polygon.length > 2) order.forEach((i) => { if (isInside(toX(i), toY(i), polygon)) chosen.add(i); });
      listChosen();
    } else if (grabbed && !grabbed.moved) {
      const i = at(x, y);
      const looked = event.pointerType === "mouse" || i === current;  // a first tap looks, a second chooses
      if (i !== null && looked) toggle(i);
      show(i);
    }
    grabbed = null;
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", (event) => { fingers.delete(event.pointerId); lasso = grabbed = null; redraw(); });
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && !grabbed && !lasso) show(null); });
  canvas.addEventListener("blur", () => show(null));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 30 : 1) * (event.ctrlKey ? 4 : 1) / 500), ...spot(event));
    show(at(...spot(event)));
  }, { passive: false });
  const step = (dx, dy) => {  // to the nearest image in that direction
    const x = current === null ? space.width / 2 : toX(current), y = current === null ? space.height / 2 : toY(current);
    let best = null, least = Infinity;
    for (let i = 0; i < count; i++) {
      if (i === current || !isShown(i)) continue;
      const along = (toX(i) - x) * dx + (toY(i) - y) * dy, aside = Math.abs((toX(i) - x) * dy) + Math.abs((toY(i) - y) * dx);
      if (current !== null && (along <= 0 || aside > along)) continue;
      const far = current === null ? Math.hypot(along, aside) : along + 2 * aside;
      if (far < least) [best, least] = [i, far];
    }
    if (best === null) return;
    const margin = 60;
    const outX = toX(best) < margin ? margin - toX(best) : Math.min(0, space.width - margin - toX(best));
    const outY = toY(best) < margin ? margin - toY(best) : Math.min(0, space.height - margin - toY(best));
    if (view.scale > 1 && (outX || outY)) pan(outX, outY);
    show(best);
    speak(best);
  };
  canvas.addEventListener("keydown", (event) => {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const middle = () => current === null ? [space.width / 2, space.height / 2] : [toX(current), toY(current)];
    const keys = {
      "+": () => zoomAt(1.4, ...middle()), "=": () => zoomAt(1.4, ...middle()),
      "-": () => zoomAt(1 / 1.4, ...middle()), "_": () => zoomAt(1 / 1.4, ...middle()), 0: showAll,
      Enter: () => current !== null && (toggle(current), speak(current)), " ": () => current !== null && (toggle(current), speak(current)),
      Escape: () => { show(null); setLasso(false); },
      l: () => setLasso(!lassoing),
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (arrows[event.key]) {
      const [dx, dy] = arrows[event.key];
      event.shiftKey ? (show(null), pan(-80 * dx, -80 * dy)) : step(dx, dy);
    } else if (keys[event.key]) keys[event.key](); else return;
    event.preventDefault();
  });

  const filterChanged = () => {
    let shown = 0;
    for (let i = 0; i < count; i++) shown += isShown(i);
    shownText.textContent = shown === count ? `All ${count.toLocaleString("en")} shown` : `${shown.toLocaleString("en")} of ${count.toLocaleString("en")} shown`;
    show(null);
    redraw();
  };
  const chips = find(".chips");
  if (chips && labels) {
    const sizes = new Map();
    labels.forEach((label) => sizes.set(label, (sizes.get(label) ?? 0) + 1));
    [...sizes.keys()].sort((a, b) => a - b).forEach((label) => {
      const mark = make("i", { class: "swatch" });
      mark.style.setProperty("--colour", data.colours[label]);
      const chip = make("button", { type: "button", class: "chip", "aria-pressed": "false", "data-name": classes[label].toLowerCase() });
      chip.append(mark, make("span", { text: classes[label] }), make("small", { text: sizes.get(label) }));
      chip.addEventListener("click", () => {
        only.has(label) ? only.delete(label) : only.add(label);
        chip.setAttribute("aria-pressed", only.has(label));
        filterChanged();
      });
      chips.append(chip);
    });
    find("[data-do=all]").addEventListener("click", () => {
      only.clear();
      if (mistakes) mistakes.checked = false;
      chips.querySelectorAll(".chip").forEach((chip) => chip.setAttribute("aria-pressed", "false"));
      filterChanged();
    });
    find("[type=search]")?.addEventListener("input", (event) => {
      const wanted = event.target.value.trim().toLowerCase();
      chips.querySelectorAll(".chip").forEach((chip) => { chip.hidden = !chip.dataset.name.includes(wanted); });
    });
  }
  mistakes?.addEventListener("change", filterChanged);
  points.addEventListener("change", redraw);
  colourBy?.addEventListener("change", redraw);
  lassoButton.addEventListener("click", () => setLasso(!lassoing));
  find("[data-do=in]").addEventListener("click", () => zoomAt(1.5, space.width / 2, space.height / 2));
  find("[data-do=out]").addEventListener("click", () => zoomAt(1 / 1.5, space.width / 2, space.height / 2));
  find("[data-do=fit]").addEventListener("click", showAll);
  find("[data-do=clear]").addEventListener("click", () => { chosen.clear(); listChosen(); });
  find("[data-do=copy]").addEventListener("click", (event) => copyText(list.value, event.currentTarget));
  find("[data-do=save]").addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([list.value, "\n"], { type: "text/plain" }));
    const link = make("a", { href: address, download: `${data.file}.txt` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  });
  root.atlas = { view, chosen, only, toX, toY, order: () => order, current: () => current };
  sprite.decode?.().then(redraw, redraw);
  new ResizeObserver(redraw).observe(canvas);
  document.addEventListener("themechange", paint);
  window.addEventListener("beforeprint", draw);
  filterChanged();
  listChosen();
  paint();
})();
