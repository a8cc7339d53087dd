// Draws the charts of a load-test report with uPlot. The data stands in the page; nothing is fetched.
"use strict";
(function () {
  const root = document.documentElement;
  const charts = JSON.parse(document.getElementById("data").textContent);
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const seriesColour = (series) => {
    const count = 6;
    return colour("--series-" + (series.colour === "error" ? "error" : series.colour % count));
  };
  let plots = [];

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const digits = size >= 1000 || value === 0 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3;
    return value.toLocaleString("en-US", { maximumFractionDigits: digits });
  }

  // Stretches outside the measurement are shaded and named.
  function shadeOutside(chart) {
    return (u) => {
      if (!chart.window) return;
      const { left, top, width, height } = u.bbox;
      const at = (x) => Math.min(left + width, Math.max(left, u.valToPos(x, "x", true)));
      const start = at(chart.window[0]), end = at(chart.window[1]);
      u.ctx.save();
      u.ctx.fillStyle = colour("--shade");
      u.ctx.fillRect(left, top, start - left, height);
      u.ctx.fillRect(end, top, left + width - end, height);
      u.ctx.fillStyle = colour("--muted");
      u.ctx.font = 11 * devicePixelRatio + "px system-ui, sans-serif";
      u.ctx.textBaseline = "top";
      const name = (text, x, space) => {
        if (u.ctx.measureText(text).width + 12 * devicePixelRatio < space) {
          u.ctx.fillText(text, x + 6 * devicePixelRatio, top + 6 * devicePixelRatio);
        }
      };
      name("warm-up", left, start - left);
      name("after", end, left + width - end);
      u.ctx.restore();
    };
  }

  function tooltip(chart) {
    let box;
    return {
      hooks: {
        init: (u) => {
          box = document.createElement("div");
          box.className = "tooltip";
          u.over.appendChild(box);
          u.over.addEventListener("mouseleave", () => { box.style.display = "none"; });
        },
        setCursor: (u) => {
          const { idx, left, top } = u.cursor;
          if (idx === null || idx === undefined || left < 0) { box.style.display = "none"; return; }
          box.textContent = "";
          const line = (label, value) => {
            const row = document.createElement("div"), name = document.createElement("span");
            name.textContent = label + " ";
            row.append(name, value);
            box.append(row);
          };
          const last = chart.data[0].length - 1;
          const steps = chart.series[0].style === "steps";
          const x = number(chart.data[0][idx]) + (steps && idx < last ? " to " + number(chart.data[0][idx + 1]) : "");
          line(chart.x === "position" ? "chunk" : "", x + (chart.x === "position" ? "" : " " + chart.x));
          chart.series.forEach((series, place) => {
            const value = chart.data[place + 1][idx];
            if (value !== null) line(series.label, number(value) + " " + chart.y);
          });
          box.style.display = "block";
          const right = left > u.over.clientWidth / 2;
          box.style.left = right ? "auto" : left + 14 + "px";
          box.style.right = right ? u.over.clientWidth - left + 14 + "px" : "auto";
          box.style.top = Math.min(top + 10, u.over.clientHeight - box.offsetHeight) + "px";
        },
      },
    };
  }

  function seriesOptions(series) {
    const stroke = seriesColour(series);
    const options = { label: series.label, stroke, width: 2, spanGaps: true, points: { show: false } };
    if (series.style === "points") {
      options.paths = () => null;
      options.points = { show: true, size: 4, width: 0, fill: stroke, stroke };
    } else if (series.style === "steps") {
      options.paths = uPlot.paths.stepped({ align: 1 });
      options.fill = stroke + "33";
      options.width = 1.5;
    } else if (series.style === "area") {
      options.fill = stroke + "22";
    } else if (series.style === "dash") {
      options.dash = [6, 4];
    }
    return options;
  }

  function draw(chart, place) {
    const element = document.getElementById("chart-" + place);
    const axis = {
      stroke: colour("--muted"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
      labelSize: 18, labelGap: 0,
      grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1, size: 4 },
    };
    const whole = chart.x === "position" ? { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 10000] } : {};
    const values = (u, splits) => splits.map((value) => (value === null ? "" : number(value)));
    const options = {
      width: element.clientWidth, height: element.clientHeight,
      legend: { show: false },
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      padding: [8, 12, 0, 0],
      scales: {
        x: { time: false, distr: chart.log_x ? 3 : 1, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { range: chart.y_range ? () => chart.y_range : (u, low, high) => [0, high > 0 ? high * 1.08 : 1] },
      },
      axes: [
        { ...axis, ...whole, values, label: chart.x === "position" ? "chunk" : chart.x, size: 28, space: 60 },
        { ...axis, values, label: chart.y, size: 50 },
      ],
      series: [{}, ...chart.series.map(seriesOptions)],
      hooks: { drawClear: [shadeOutside(chart)] },
      plugins: [tooltip(chart)],
    };
    return new uPlot(options, chart.data, element);
  }

  function drawAll() {
    plots.forEach((plot) => plot.destroy());
    plots = charts.map(draw);
    document.querySelectorAll("[data-colour]").forEach((key) => {
      key.style.background = seriesColour({ colour: key.dataset.colour === "error" ? "error" : Number(key.dataset.colour) });
    });
  }

  // For tests, and for anyone who wonders: how many charts there are and how many have something on them.
  function report() {
    const drawn = plots.filter((plot) => {
      const { width, height } = plot.ctx.canvas;
      return width > 0 && height > 0 && plot.ctx.getImageData(0, 0, width, height).data.some((value) => value !== 0);
    });
    root.dataset.charts = String(plots.length);
    root.dataset.drawn = String(drawn.length);
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let chosen = null;
  function setTheme() {
    const theme = chosen || (dark.matches ? "dark" : "light");
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    drawAll();
  }
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme();
  });
  dark.addEventListener("change", setTheme);
  setTheme();
  setTimeout(report, 0);

  new ResizeObserver(() => {
    plots.forEach((plot) => {
      const element = plot.root.parentElement;
      if (element.clientWidth !== plot.width) plot.setSize({ width: element.clientWidth, height: element.clientHeight });
    });
  }).observe(document.querySelector("main"));
})();
