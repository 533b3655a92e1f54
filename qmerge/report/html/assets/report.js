// Sorts, filters and downloads the tables of the page, switches its heat maps and draws. Without it, the page shows the same
// numbers. Text from files is only ever set as text.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  document.documentElement.classList.add("js");

  // --- tables: a cell of numbers has its value in data-n, empty where there is none ---

  const textOf = (cell) => cell.textContent.trim();
  const valueOf = (cell) => (cell.dataset.n === undefined ? textOf(cell) : cell.dataset.n === "" ? null : Number(cell.dataset.n));

  function compare(one, other) {
    if (one === null || other === null) return (one === null) - (other === null);
    return typeof one === "number" ? one - other : one.localeCompare(other, "en", { numeric: true });
  }

  function sortBy(table, column, descending) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
    rows.sort(([one], [other]) => {
      // Rows without a value are last in both directions.
      if (one === null || other === null) return compare(one, other);
      return descending ? compare(other, one) : compare(one, other);
    });
    body.append(...rows.map(([, row]) => row));
    [...table.tHead.rows[0].cells].forEach((cell, position) => {
      if (position === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
  }

  function makeSortable(table) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = textOf(cell);
      button.addEventListener("click", () => sortBy(table, column, cell.getAttribute("aria-sort") === "ascending"));
      cell.replaceChildren(button);
    });
  }

  function filter(table, words, status) {
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = textOf(row.cells[0]).toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    status.textContent = words.length ? `${shown} of ${table.tBodies[0].rows.length} rows` : "";
  }

  function csvField(cell) {
    let text = cell.dataset.n === undefined ? textOf(cell) : cell.dataset.n;
    // A spreadsheet would run a name that begins like a formula.
    if (cell.dataset.n === undefined && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function csv(table) {
    const rows = [table.tHead.rows[0], ...[...table.tBodies[0].rows].filter((row) => !row.hidden)];
    return rows.map((row) => [...row.cells].map(csvField).join(",")).join("\r\n") + "\r\n";
  }

  function download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  for (const section of document.querySelectorAll("[data-table]")) {
    const table = section.querySelector("table");
    const input = section.querySelector("input");
    makeSortable(table);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      filter(table, words, section.querySelector("[role=status]"));
    });
    section.querySelector(".tools button").addEventListener("click", () => download(`qmerge-${section.dataset.table}.csv`, csv(table)));
  }

  // --- heat maps ---

  for (const section of document.querySelectorAll("[data-maps]")) {
    const show = (name) => section.querySelectorAll("[data-map]").forEach((map) => (map.hidden = map.dataset.map !== name));
    section.querySelectorAll("input[name=map]").forEach((input) => input.addEventListener("change", () => show(input.value)));
    show(section.querySelector("input[name=map]:checked").value);
  }

  // --- drawings ---

  // Okabe and Ito's colours, which people who confuse red and green can tell apart.
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];
  const HEIGHT = 320;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const percent = (share) => `${Math.round(100 * share)} %`;
  const axis = (label, more) => ({ label, stroke: () => css("--quiet"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false }, ...more });
  const roundNumbers = (low, high) => {
    const numbers = [];
    for (let decade = 10 ** Math.floor(Math.log10(low)); decade <= high; decade *= 10) {
      for (const digit of [1, 2, 5]) if (digit * decade >= low && digit * decade <= high) numbers.push(digit * decade);
    }
    return numbers;
  };
  const keptAxis = (name) => axis(name, { values: (plot, values) => values.map(percent), size: 60 });

  function draw(name, options, values) {
    const place = document.querySelector(`[data-drawing=${name}]`);
    const size = () => ({ width: place.clientWidth, height: HEIGHT });
    const plot = new uPlot({ ...size(), ...options }, values, place);
    new ResizeObserver(() => plot.setSize(size())).observe(place);
    for (const query of ["print", "(prefers-color-scheme: dark)"]) {
      matchMedia(query).addEventListener("change", () => plot.redraw(false));
    }
  }

  function nearest(plot, line) {
    const { left, top } = plot.cursor;
    let found = null;
    let least = Infinity;
    plot.data[0].forEach((x, index) => {
      const distance = Math.hypot(plot.valToPos(x, "x") - left, plot.valToPos(plot.data[line][index], "y") - top);
      if (distance < least) [found, least] = [index, distance];
    });
    return found;
  }

  function drawHalfStep(plot, half) {
    const x = plot.valToPos(half, "x", true);
    const { left, top, width, height } = plot.bbox;
    if (x < left || x > left + width) return;
    const { ctx } = plot;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = css("--text");
    ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, top);
    ctx.lineTo(x, top + height);
    ctx.stroke();
    ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
    const isRight = x > left + width / 2;
    ctx.textAlign = isRight ? "right" : "left";
    ctx.textBaseline = "top";
    ctx.fillText("half a step", x + (isRight ? -6 : 6) * devicePixelRatio, top + 4);
    ctx.restore();
  }

  function drawScatter({ steps, name, kept, predicted, labels, half, least, most }) {
    const picked = document.querySelector("[data-picked=scatter]");
    const dots = (label, colour, fill) => ({
      label, stroke: () => css(colour), paths: () => null,
      points: { show: true, size: 7, width: 1.5, stroke: () => css(colour), fill: () => (fill ? css(colour) : "transparent") },
    });
    const low = Math.min(steps[0], half) / 1.3;
    const high = Math.max(steps[steps.length - 1], half) * 1.3;
    draw("scatter", {
      scales: { x: { time: false, distr: 3, range: [low, high] }, y: { range: [least, most] } },
      axes: [axis("size of the delta, in steps of the grid", {
        splits: () => roundNumbers(low, high), filter: (plot, splits) => splits,
        values: (plot, splits) => splits.map((split) => String(Number(split.toPrecision(1)))),
      }), keptAxis(name)],
      series: [{}, dots("predicted for rounding to nearest", "--ring", false), dots(name, "--dot", true)],
      legend: { live: false },
      cursor: { drag: { x: false, y: false }, points: { show: false } },
      hooks: {
        draw: [(plot) => drawHalfStep(plot, half)],
        setCursor: [(plot) => {
          const index = nearest(plot, 2);
          picked.textContent = index === null || plot.cursor.left < 0 ? "" : `${labels[index]}; delta of ${steps[index]} steps`;
        }],
      },
    }, [steps, predicted, kept]);
  }

  function drawRanks({ sizes, lines, least, most }) {
    const series = lines.map(({ name }, position) => ({
      label: name, width: name === "all" ? 3 : 1.5,
      stroke: name === "all" ? () => css("--text") : COLOURS[position % COLOURS.length],
      dash: name !== "all" && position >= COLOURS.length ? [6, 4] : undefined,
      points: { show: false }, value: (plot, value) => (value === null ? "–" : percent(value)),
    }));
    const ofSizes = { label: "size", stroke: () => css("--quiet"), dash: [2, 3], value: (plot, value) => (value === null ? "–" : value.toFixed(2)), points: { show: false } };
    draw("ranks", {
      scales: { x: { time: false }, y: { range: [least, most] } },
      axes: [axis("rank, by the size of its singular value", { incrs: [1, 2, 5, 10, 20, 50, 100] }), keptAxis("kept")],
      series: [{ label: "rank", value: (plot, value) => (value === null ? "–" : String(value)) }, ofSizes, ...series],
      cursor: { drag: { x: false, y: false } },
      // There are more kinds than colours: the frame of a name in the legend is dashed as its line is.
      legend: { markers: { dash: (plot, index) => (index === 1 ? "dotted" : plot.series[index].dash ? "dashed" : "solid") } },
    }, [sizes.map((_, index) => index + 1), sizes, ...lines.map(({ kept }) => kept)]);
  }

  if (data.scatter?.steps) drawScatter(data.scatter);
  if (data.ranks?.sizes) drawRanks(data.ranks);
})();
