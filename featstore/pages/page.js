// What a page does beside its figures: sorts tables, shows an image where a point is hovered, and its neighbours.
// All text goes in as text; nothing that a page holds is ever read as a program or as HTML.
"use strict";
(() => {
  const read = (element) => JSON.parse(element.textContent);
  const pictures = read(document.getElementById("pictures"));
  const made = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // ---- the bar above, of as many lines as its links take: what a link leads to begins below it

  const bar = document.querySelector("nav");
  const below = () => (document.documentElement.style.scrollPaddingTop = `${bar.offsetHeight + 8}px`);
  below();
  addEventListener("resize", below);

  // ---- images

  const addressOf = (place) =>
    pictures.thumbnailsAt ? `${pictures.thumbnailsAt}/${place}` : (pictures.thumbnails || {})[place];
  const thumb = (place) => {
    const address = addressOf(place);
    if (address === undefined) return made("span", "thumb none", pictures.names[place]);
    const image = made("img", "thumb");
    image.alt = "";
    image.loading = pictures.thumbnailsAt ? "lazy" : "eager";
    image.src = address;
    return image;
  };
  const picture = (place, words) => {
    const button = made("button", "picture");
    button.dataset.place = place;
    button.append(thumb(place), made("span", "", words), made("span", "name", pictures.names[place]));
    button.title = pictures.names[place];
    return button;
  };
  for (const each of document.querySelectorAll(".gallery .picture")) each.prepend(thumb(each.dataset.place));

  // ---- neighbours of the image that is chosen

  const chosen = document.getElementById("chosen");
  const nearOf = async (place) => {
    if (!pictures.nearAt) return (pictures.near || {})[place];
    const answer = await fetch(`${pictures.nearAt}/${place}`);
    if (!answer.ok) return undefined;
    const found = await answer.json();
    Object.assign(pictures.names, found.names);
    Object.assign(pictures.labels, found.labels);
    return found.near;
  };
  let latest = 0;
  const choose = async (place) => {
    const asked = ++latest;
    const near = await nearOf(place);
    if (asked !== latest) return;
    const strip = made("div", "strip");
    strip.append(picture(place, pictures.labels[place] || ""));
    for (const [other, similarity] of near || []) {
      strip.append(picture(other, [similarity.toFixed(3), pictures.labels[other]].filter(Boolean).join(" · ")));
    }
    const title = made("h2");
    title.append(made("span", "", near ? `Nearest to ${pictures.names[place]}` : pictures.names[place]));
    const close = made("button", "close", "close (Esc)");
    close.addEventListener("click", forget);
    title.append(close);
    const words = near ? pictures.nearWords : "No features of this image are at hand, so its neighbours aren't known.";
    const inside = made("div");
    inside.append(title, made("p", "", words), strip);
    chosen.replaceChildren(inside);
    chosen.hidden = false;
    mark([Number(place), ...(near || []).map(([other]) => other)]);
  };
  const forget = () => {
    latest += 1;
    chosen.hidden = true;
    mark([]);
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".picture");
    if (button) choose(button.dataset.place);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") forget();
  });

  // ---- tables

  const order = new Intl.Collator(undefined, { numeric: true }).compare;
  const compared = (a, b) => {
    if (a === b) return 0;
    if (a === "" || b === "") return a === "" ? Infinity : -Infinity; // what isn't known stands last, whichever way
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? order(a, b) : x - y;
  };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const falls = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", falls ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.value;
        const rows = [...table.tBodies[0].rows].sort((one, two) => {
          const by = compared(value(one), value(two));
          return falls && Number.isFinite(by) ? -by : by === Infinity ? 1 : by === -Infinity ? -1 : by;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // ---- figures

  const hover = document.getElementById("hover");
  const maps = [];
  const showHover = (place, event) => {
    hover.replaceChildren(thumb(place), made("div", "", pictures.labels[place] || ""), made("div", "name", pictures.names[place]));
    hover.dataset.place = place;
    hover.hidden = false;
    const { clientX: x, clientY: y } = event;
    const { offsetWidth: width, offsetHeight: height } = hover;
    hover.style.left = `${x + 18 + width > innerWidth ? Math.max(4, x - 18 - width) : x + 18}px`;
    hover.style.top = `${Math.max(4, Math.min(y - height / 2, innerHeight - height - 4))}px`;
  };
  const themed = (layout) => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const clear = "rgba(0,0,0,0)";
    const font = { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13 };
    const modebar = { bgcolor: clear, color: colour("--quiet"), activecolor: colour("--accent") };
    const theme = { ...layout, paper_bgcolor: clear, plot_bgcolor: clear, font, modebar };
    for (const name of Object.keys(layout).filter((each) => /^[xy]axis\d*$/.test(each))) {
      theme[name] = { ...layout[name], gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
    }
    return theme;
  };
  const mark = (places) => {
    for (const { element, at, last } of maps) {
      const here = places.filter((place) => at.has(place));
      const sizes = here.map((place) => (place === places[0] ? 20 : 13));
      const [x, y] = [here.map((place) => at.get(place)[0]), here.map((place) => at.get(place)[1])];
      Plotly.restyle(element, { x: [x], y: [y], "marker.size": [sizes] }, [last]);
    }
  };
  const drawn = async (element) => {
    const { data, layout } = read(element.querySelector("script"));
    const isMap = element.classList.contains("map");
    const at = new Map();
    if (isMap) {
      for (const { customdata, x, y } of data) customdata.forEach((place, row) => at.set(place, [x[row], y[row]]));
      const ring = { color: "rgba(0,0,0,0)", line: { color: "#e0245e", width: 2 }, size: 14 };
      data.push({ type: "scatter", mode: "markers", x: [], y: [], marker: ring, hoverinfo: "skip", showlegend: false });
    }
    const config = { responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]] };
    await Plotly.newPlot(element, data, themed(layout), config);
    if (!isMap) return;
    maps.push({ element, at, last: data.length - 1 });
    element.on("plotly_hover", ({ points, event }) => showHover(points[0].customdata, event));
    element.on("plotly_unhover", () => { hover.hidden = true; });
    element.on("plotly_click", ({ points }) => choose(points[0].customdata));
  };
  const figures = [...document.querySelectorAll(".figure")];
  (async () => {
    for (const each of figures) await drawn(each); // one after another: the first is there at once
    document.documentElement.dataset.ready = "true";
  })();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const each of figures) Plotly.relayout(each, themed(each.layout));
  });
})();
